"""bitsandbytes 4-bit folders are read as bitsandbytes itself dequantizes them, bit for bit; damaged ones are named."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from export import checkpoints
from export.checkpoints import open_source
from export.checkpoints.origin import parse_origin
from export.pipeline import export
from export.plan import load_plan
from tests.support.checkpoints import (
    LLAMA,
    SMALL,
    TOKENIZER_FILES,
    refusal,
    set_config,
    weights,
    write_bnb,
    write_folder,
    write_shards,
)
from tests.support.harms import rename, set_quantization, tensors

pytest.importorskip("bitsandbytes", reason="bitsandbytes (the judge of its own format) is not installed")

WIDE = SMALL.model_copy(update={"num_hidden_layers": 2})
# blocks of 64 that cross rows, a short last block, an odd count of elements
CROOKED = SMALL.model_copy(update={"hidden_size": 63, "intermediate_size": 131, "head_dim": 14, "vocab_size": 288})
LINEAR = "model.layers.0.mlp.up_proj.weight"


def theirs(folder, name, dtype):
    """The weight as bitsandbytes dequantizes it into `dtype`."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    parts = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    if not parts:
        return tensors[name].to(dtype)
    state = QuantState.from_dict(parts, torch.device("cpu"))
    assert state.dtype == torch.bfloat16
    state.dtype = dtype
    return dequantize_4bit(tensors[name].view(torch.uint8).view(-1, 1), state)


def assert_theirs(folder, quantized):
    """Every tensor equals bitsandbytes' in float32, and after its own rounding to bfloat16; counts the quantized."""
    opened = checkpoints.load(LLAMA, parse_origin(str(folder)))
    originals, count = weights(opened.architecture), 0
    for name, shape in opened.architecture.tensor_shapes().items():
        weight = opened.read(name)
        assert (weight.dtype, tuple(weight.shape)) == (torch.float32, shape)
        assert torch.equal(weight, theirs(folder, name, torch.float32)), name
        assert torch.equal(weight.bfloat16(), theirs(folder, name, torch.bfloat16)), name
        count += not torch.equal(weight, originals[name])
    assert count == quantized
    return opened


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_folder_reads_back_as_bitsandbytes_reads_it(tmp_path, kind, nested, storage):
    folder = write_bnb(tmp_path / "bnb", WIDE, kind=kind, nested=nested, storage=storage, keep=["layers.1.mlp"])
    opened = assert_theirs(folder, quantized=11)
    words = f"bitsandbytes {kind.upper()}, {'nested' if nested else 'not nested'}, 3 of 14 linears in bf16"
    assert opened.source.description == f"Hugging Face folder, {words}"


@pytest.mark.parametrize("blocksize", [64, 128, 4096])
def test_blocks_that_cross_rows_and_end_short(tmp_path, blocksize):
    folder = write_bnb(tmp_path / "bnb", CROOKED, blocksize=blocksize)
    opened = assert_theirs(folder, quantized=7)
    assert opened.source.description.endswith("nested, all 7 linears")


def test_shards_and_a_config_that_says_nothing(tmp_path):
    folder = write_bnb(tmp_path / "bnb")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = write_shards(folder, tensors, 3)  # parts of one weight apart
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert set(assert_theirs(folder, quantized=7).sha256) == {"config.json", *files, *TOKENIZER_FILES}


@pytest.mark.parametrize("skip", [None, ["lm_head", "model.layers.1.self_attn", "model.layers.0.mlp.down_proj"]])
def test_a_folder_that_transformers_quantized_and_saved(tmp_path, skip):
    """As Unsloth makes its downloads: plain, and dynamic with modules left out by dotted names."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skip,
    )  # fmt: skip
    write_folder(tmp_path / "float", WIDE)
    LlamaForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "bnb")
    opened = assert_theirs(tmp_path / "bnb", quantized=9 if skip else 14)
    assert opened.architecture == WIDE
    assert opened.source.description.endswith("5 of 14 linears in bf16" if skip else "all 14 linears")


def test_layer_1_is_not_layer_10(tmp_path):
    """The header decides which linears are floats, not the beginning of a name."""
    deep = SMALL.model_copy(update={"num_hidden_layers": 11})
    opened = checkpoints.load(LLAMA, parse_origin(str(write_bnb(tmp_path / "bnb", deep, keep=["layers.1.mlp"]))))
    changed = [name for name, weight in weights(deep).items() if not torch.equal(opened.read(name), weight)]
    assert Counter(name.split(".")[2] for name in changed if "mlp" in name)["10"] == 3
    assert not any(name.startswith("model.layers.1.mlp") for name in changed)


def test_an_artifact_is_built_from_it(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = write_bnb(tmp_path / "bnb", keep=["down_proj"])
    built = export(load_plan("llama", "int4-g32", "onnx-cpu"), parse_origin(str(folder)), tmp_path / "out")
    assert built.checkpoint.description == "Hugging Face folder, bitsandbytes NF4, nested, 1 of 7 linears in bf16"


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_bnb(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "bnb")


def set_state(raw=None, name=f"{LINEAR}.quant_state.bitsandbytes__nf4", **fields):
    """A change of one weight's state: some fields, or all of its bytes."""

    def change(tensors):
        state = json.loads(bytes(tensors[name].tolist())) | fields
        text = json.dumps({key: value for key, value in state.items() if value != "gone"}).encode()
        tensors[name] = torch.tensor(list(text if raw is None else raw), dtype=torch.uint8)

    return change


NF4, FP4, NF5 = (f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4", "nf5"))
BROKEN = {
    "no absmax": (lambda t: t.pop(f"{LINEAR}.absmax"), f"{LINEAR}.absmax is missing"),
    "no quant_map": (lambda t: t.pop(f"{LINEAR}.quant_map"), f"{LINEAR}.quant_map is missing"),
    "no nested_absmax": (lambda t: t.pop(f"{LINEAR}.nested_absmax"), "nested_absmax is missing"),
    "no nested_quant_map": (lambda t: t.pop(f"{LINEAR}.nested_quant_map"), "nested_quant_map is missing"),
    "no state": (lambda t: t.pop(LINEAR + NF4), f"{LINEAR}.quant_state.* is missing"),
    "no weight": (lambda t: t.pop(LINEAR), f"tensor {LINEAR} is missing"),
    "two states": (lambda t: t.update({LINEAR + FP4: t[LINEAR + NF4]}), "second quant_state|its name says"),
    "nf4 named fp4": (rename(LINEAR + NF4, LINEAR + FP4), "its name says 'bitsandbytes__fp4'"),
    "state of an unknown kind": (rename(LINEAR + NF4, LINEAR + NF5), "its name says 'bitsandbytes__nf5'"),
    "absmax cut": (lambda t: t.update({f"{LINEAR}.absmax": t[f"{LINEAR}.absmax"][:-1]}), "has 127 elements of U8"),
    "absmax as floats": (lambda t: t.update({f"{LINEAR}.absmax": torch.ones(128)}), "128 elements of F32, expected"),
    "quant_map of 15": (lambda t: t.update({f"{LINEAR}.quant_map": torch.ones(15)}), "15 elements of F32"),
    "quant_map in half": (lambda t: t.update({f"{LINEAR}.quant_map": torch.ones(16).half()}), "16 elements of F16"),
    "nested map of 255": (lambda t: t.update({f"{LINEAR}.nested_quant_map": torch.ones(255)}), "255 elements of F32"),
    "nested absmax of 2": (lambda t: t.update({f"{LINEAR}.nested_absmax": torch.ones(2)}), "2 elements of F32"),
    "weight cut": (lambda t: t.update({LINEAR: t[LINEAR][:-1]}), "has 4095 elements of U8; 4 bits of shape"),
    "weight doubled": (lambda t: t.update({LINEAR: t[LINEAR].repeat(2, 1)}), "has 8192 elements of U8"),
    "weight complex": (lambda t: t.update({LINEAR: torch.ones(512, dtype=torch.complex64)}), "512 elements of C64"),
    "NaN in absmax": (lambda t: t[f"{LINEAR}.nested_absmax"].fill_(float("nan")), f"{LINEAR} holds NaN or infinity"),
    "infinite map": (lambda t: t[f"{LINEAR}.quant_map"].fill_(float("inf")), f"{LINEAR} holds NaN or infinity"),
    "unknown quant_type": (set_state(quant_type="int4"), "quant_type: 'int4' is unknown (known: fp4, nf4)"),
    "other quant_type": (set_state(quant_type="fp4"), "says quant_type 'fp4', its name says"),
    "no quant_type": (set_state(quant_type="gone"), "quant_type: missing"),
    "no blocksize": (set_state(blocksize="gone"), "blocksize: missing"),
    "blocksize 0": (set_state(blocksize=0), "blocksize: Input should be greater than 0"),
    "blocksize -64": (set_state(blocksize=-64), "blocksize: Input should be greater than 0"),
    "blocksize 63": (set_state(blocksize=63), "absmax has 128 elements of U8, expected 131"),
    "blocksize 2^200": (set_state(blocksize=2**200), "absmax has 128 elements of U8, expected 1 of"),
    "blocksize as text": (set_state(blocksize="64"), "blocksize: Input should be a valid integer"),
    "other shape": (set_state(shape=[64, 64]), "absmax has 128 elements of U8, expected 64"),
    "turned shape": (set_state(shape=[64, 128]), f"{LINEAR} has shape [64, 128], the architecture needs [128, 64]"),
    "one dimension": (set_state(shape=[8192]), "shape: "),
    "no shape": (set_state(shape=None), "shape: "),
    "negative shape": (set_state(shape=[-128, -64]), "shape.0: Input should be greater than 0"),
    "huge shape": (set_state(shape=[2**62, 2**62]), "has 128 elements of U8, expected"),
    "unknown key": (set_state(offset=1), "offset: unknown key"),
    "half nested": (set_state(nested_offset="gone"), "belong together"),
    "not nested after all": (
        set_state(nested_offset="gone", nested_blocksize="gone", nested_dtype="gone"), "128 elements of U8, expected",
    ),
    "nested_dtype": (set_state(nested_dtype="float16"), "nested_dtype: "),
    "nested_blocksize": (set_state(nested_blocksize=4), "nested_absmax has 1 elements of F32, expected 32"),
    "nested_offset NaN": (set_state(nested_offset=float("nan")), "nested_offset: "),
    "state empty": (set_state(raw=b""), "is not valid JSON"),
    "state no JSON": (set_state(raw=b"\x80\x04K\x01."), "is not valid JSON"),
    "state a list": (set_state(raw=b"[1, 2]"), "valid dictionary"),
    "state too deep": (set_state(raw=b"[" * 4000), "is not valid JSON"),
    "state too long": (set_state(raw=b" " * 5000), "is no JSON of at most 4096 bytes"),
    "state as floats": (lambda t: t.update({LINEAR + NF4: torch.ones(20)}), "is no JSON of at most 4096 bytes"),
    "leftover of nesting": (
        lambda t: (set_state(nested_offset="gone", nested_blocksize="gone", nested_dtype="gone")(t),
                   t.update({f"{LINEAR}.absmax": torch.ones(128)})), "nested_absmax is there, but",
    ),
    "absmax of no weight": (lambda t: t.update({"model.x.weight.absmax": torch.ones(1)}), "belongs to a quantized"),
    "state of no weight": (lambda t: t.update({f"model.x.weight{NF4}": t[LINEAR + NF4]}), "model.x.weight.absmax is"),
    "a norm in 4 bits": (
        lambda t: [t.update({key.replace(LINEAR, "model.norm.weight"): t[key]}) for key in list(t) if LINEAR in key],
        "model.norm.weight has shape [128, 64], the architecture needs [64]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BROKEN)
def test_parts_that_do_not_fit_are_named(folder, mistake):
    change, words = BROKEN[mistake]
    tensors(change)(folder)
    text = refusal(LLAMA, folder)
    assert any(word in text for word in words.split("|")), text


def test_without_any_change_it_opens(folder):
    """The twin: writing the tensors again is no mistake."""
    tensors(lambda _: None)(folder)
    assert len(checkpoints.load(LLAMA, parse_origin(str(folder))).source.shapes) == len(SMALL.tensor_shapes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4', but the tensors say 'nf4'"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "bnb_4bit_quant_type is ['nf4']"),
        ({"bnb_4bit_use_double_quant": False}, "bnb_4bit_use_double_quant is False, but the tensors say True"),
        ({"quant_method": "awq"}, "already quantized (quant_method 'awq')"),
        ({"quant_method": None}, "already quantized (quant_method None)"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "without load_in_4bit"),
    ],
)
def test_a_config_that_says_otherwise(folder, change, words):
    set_quantization(folder, **change)
    assert words in refusal(LLAMA, folder)


@pytest.mark.parametrize("value", ["bitsandbytes", ["x"], 4])
def test_a_config_of_another_kind(folder, value):
    set_config(folder, quantization_config=value)
    assert "quantization_config is" in refusal(LLAMA, folder)


def test_a_wrong_nibble_order_would_be_seen(folder):
    """The negative twin of the comparison with bitsandbytes: swapped nibbles are different weights."""
    before = open_source(parse_origin(str(folder)), None).read(LINEAR)
    tensors(lambda t: t.update({LINEAR: (t[LINEAR] << 4) | (t[LINEAR] >> 4)}))(folder)
    after = open_source(parse_origin(str(folder)), None).read(LINEAR)
    assert not torch.equal(after, before)
    assert torch.equal(after.view(-1, 2).flip(1).reshape(before.shape), before)


def test_every_message_is_about_this_file(folder):
    tensors(set_state(blocksize=63))(folder)
    assert re.match(rf"{re.escape(str(folder))}/model\.safetensors: tensor model\.layers\.0", refusal(LLAMA, folder))
