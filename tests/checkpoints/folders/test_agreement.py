"""Where two places of a folder say one thing: what transformers takes is taken and said, or both are named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import checkpoints
from export.architecture import EMBEDDING, HEAD
from export.build import skip
from export.checkpoints.origin import adapted, parse_origin
from export.quantization.eager import eager
from tests.support.checkpoints import (
    ADAPTER,
    BNB_CONFIG,
    FILE,
    GPTQ_CONFIG,
    INDEX,
    LLAMA,
    PTH,
    SMALL,
    UP,
    refusal,
    set_config,
    weights,
    write_folder,
    write_index,
    write_lora,
    write_meta,
    write_raw,
)
from tests.support.reliability import DISAGREEMENT

pytestmark = DISAGREEMENT

BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
UNTIED = SMALL.model_copy(update={"tie_word_embeddings": False})
TENSORS = {name: tensor.bfloat16() for name, tensor in weights().items()}


def theirs(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_as_transformers(folder):
    """Equal weights, equal logits. Returns the opened checkpoint."""
    opened, model = checkpoints.load(LLAMA, parse_origin(str(folder))), theirs(folder)
    state = model.state_dict()
    for name in opened.architecture.tensor_shapes():
        assert torch.equal(opened.read(name), state[name]), name
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = eager(opened.read, opened.architecture, "none")(tokens)[0]
        assert (logits - model(tokens).logits).abs().max() < 1e-4
    return opened


def drop(folder, *keys):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shards_stay", [True, False])
def test_a_new_single_file_goes_before_an_old_index(tmp_path, shards_stay):
    folder = write_folder(tmp_path / "c", shards=2)
    save_file({name: tensor * 0.5 for name, tensor in TENSORS.items()}, folder / FILE, {"format": "pt"})
    if not shards_stay:
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()
    opened = assert_as_transformers(folder)
    assert torch.equal(opened.read(EMBEDDING), TENSORS[EMBEDDING].float() * 0.5)
    assert opened.notes == ("model.safetensors is read, model.safetensors.index.json beside it is not",)
    assert "model.safetensors.index.json" not in opened.sha256


def test_a_single_file_that_is_new_beside_shards_is_a_change(tmp_path):
    origin = parse_origin(str(write_folder(tmp_path / "c", shards=2)))
    recorded = checkpoints.load(LLAMA, origin).sha256
    assert list(skip.changed_files(recorded, origin)) == []
    save_file(TENSORS, tmp_path / "c" / FILE, {"format": "pt"})
    assert [change.text for change in skip.changed_files(recorded, origin)] == [f"{tmp_path / 'c' / FILE}: new"]


def test_the_same_of_an_adapters_files(tmp_path):
    folder = write_lora(tmp_path / "c")
    (folder / ADAPTER / "adapter_model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    (folder / ADAPTER / "adapter_model.bin").write_bytes(b"x")
    opened = checkpoints.load(LLAMA, adapted(parse_origin(str(folder)), folder / ADAPTER))
    assert opened.notes[1:] == (
        "adapter_model.safetensors is read, adapter_model.safetensors.index.json beside it is not",
        "adapter_model.safetensors is read, adapter_model.bin beside it is not",
    )


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"])
def test_an_adapters_files_that_are_no_tokenizer_are_said(tmp_path, name):
    folder = write_lora(tmp_path / "c")
    (folder / ADAPTER / name).write_text("{}")
    opened = checkpoints.load(LLAMA, adapted(parse_origin(str(folder)), folder / ADAPTER))
    assert opened.notes[1:] == (f"the adapter's {name} without a tokenizer.json is not read; the base's tokenizer is",)


@pytest.mark.parametrize(
    ("beside", "note"),
    [
        ("pytorch_model.bin", "model.safetensors is read, pytorch_model.bin beside it is not"),
        ("params.json", "config.json is read, params.json beside it not"),
        ("adapter_config.json", "config.json is read, adapter_config.json beside it only with --adapter"),
        (
            "chat_template.json",
            "config.json is read, chat_template.json beside it not: save its template as chat_template.jinja if it is "
            "the model's",
        ),
    ],
)
def test_another_model_beside_it_is_named(tmp_path, beside, note):
    folder = write_folder(tmp_path / "c")
    (folder / beside).write_text("{}")
    assert checkpoints.load(LLAMA, parse_origin(str(folder))).notes == (note,)


def test_a_config_json_in_metas_folder_is_no_way_to_read_it(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    write_meta(folder)
    (folder / "config.json").write_bytes((write_folder(tmp_path / "other") / "config.json").read_bytes())
    assert "model.safetensors: missing; pickled weights are never loaded" in refusal(LLAMA, folder)
    assert f"remove config.json to read {PTH}" in refusal(LLAMA, folder)


def index(change):
    def run(folder):
        names = json.loads((folder / INDEX).read_text())["weight_map"]
        change(names)
        write_index(folder, names)

    return run


def shard(**tensors):
    def run(folder):
        path = folder / "model-0.safetensors"
        save_file(load_file(path) | tensors, path, {"format": "pt"})

    return run


SHARDS = {
    "a tied head in the index": (
        index(lambda m: m.update({HEAD: "model-0.safetensors"})),
        (f"{INDEX} promises {HEAD}, which model-0.safetensors does not hold",),
    ),
    "a buffer in the index": (
        index(lambda m: m.update({BUFFER: "model-0.safetensors"})),
        (f"{INDEX} promises {BUFFER}, which model-0.safetensors does not hold",),
    ),
    "a buffer in a shard": (shard(**{BUFFER: torch.ones(8)}), ()),
    "an equal head in a shard": (shard(**{HEAD: TENSORS[EMBEDDING]}), ()),
    "a weight that the index forgets": (index(lambda m: m.pop("model.norm.weight")), ()),
    "a weight in another shard": (index(lambda m: m.update({"model.norm.weight": "model-0.safetensors"})), ()),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_shards_say_what_they_hold(tmp_path, kind):
    change, notes = SHARDS[kind]
    change(folder := write_folder(tmp_path / "c", shards=2))
    assert assert_as_transformers(folder).notes == notes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-00001-of-00002.safetensors", f"{INDEX}: missing, but shards are there ({{}}); download it too"),
        ("model.fp16.safetensors", f"{FILE}: missing, but {{}} is there; rename it if it is the whole model"),
    ],
)
def test_weights_under_another_name_are_named(tmp_path, name, words):
    folder = write_folder(tmp_path / "c")
    (folder / FILE).rename(folder / name)
    assert refusal(LLAMA, folder) == f"{folder}/{words.format(name)}"


def test_a_weight_that_only_the_index_holds_is_named_with_its_shard(tmp_path):
    folder = write_folder(tmp_path / "c", shards=2)
    lost = next(name for name in load_file(folder / "model-1.safetensors") if "norm" in name)
    kept = {name: tensor for name, tensor in load_file(folder / "model-1.safetensors").items() if name != lost}
    save_file(kept, folder / "model-1.safetensors")
    reason = f"1 tensors are missing: {lost}; {INDEX} promises {lost}, which model-1.safetensors does not hold"
    assert reason in refusal(LLAMA, folder)


def test_a_weight_in_two_shards_is_refused(tmp_path):
    folder = write_folder(tmp_path / "c", shards=2)
    name, tensor = next(iter(load_file(folder / "model-1.safetensors").items()))
    shard(**{name: tensor})(folder)
    assert f"tensor {name} is in model-0.safetensors too; save the model again" in refusal(LLAMA, folder)


def test_an_entry_without_a_type_is_named(tmp_path):
    folder = write_folder(tmp_path / "c")
    raw = (folder / FILE).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size]) | {HEAD: {"dtype": "", "shape": [], "data_offsets": [0, 0]}}
    write_raw(folder / FILE, header, raw[8 + size :])
    assert "damaged safetensors (tensor lm_head.weight is of unknown type ''); " in refusal(LLAMA, folder)


# ── tied or not ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tied_model_may_hold_the_head_alone(tmp_path):
    tensors = {HEAD if name == EMBEDDING else name: tensor for name, tensor in TENSORS.items()}
    opened = assert_as_transformers(write_folder(tmp_path / "c", tensors=tensors))
    assert opened.notes == (f"{HEAD} is read as {EMBEDDING} too, which is not there: the two are tied",)


@pytest.mark.parametrize("absent", [True, False])
def test_an_untied_model_without_a_head_gets_the_remedy(tmp_path, absent):
    folder = write_folder(tmp_path / "c")
    set_config(folder, tie_word_embeddings=False)
    if absent:
        drop(folder, "tie_word_embeddings")
    remedy = 'set "tie_word_embeddings": true in config.json where the embedding is the head too'
    assert f"1 tensors are missing: {HEAD}; {remedy}" in refusal(LLAMA, folder)
    set_config(folder, tie_word_embeddings=True)
    assert_as_transformers(folder)


def test_without_the_key_a_model_is_not_tied(tmp_path):
    folder = write_folder(tmp_path / "c", UNTIED)
    drop(folder, "tie_word_embeddings")
    assert not assert_as_transformers(folder).architecture.tie_word_embeddings


# ── floats that are said to be quantized ────────────────────────────────────────────────────────────────────────────

METHODS = {
    "bitsandbytes": BNB_CONFIG | {"bnb_4bit_quant_type": "nf4"},
    "bitsandbytes 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": GPTQ_CONFIG,
    "awq": {"quant_method": "awq", "bits": 4},
    "torchao": {"quant_method": "torchao", "quant_type": {}},
    "fp8": {"quant_method": "fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    None: {"bits": 4},
}


@pytest.mark.parametrize("method", METHODS)
def test_floats_are_floats_whatever_a_base_has_left_in_the_config(tmp_path, method):
    folder = write_folder(tmp_path / "c")
    set_config(folder, quantization_config=METHODS[method])
    opened = checkpoints.load(LLAMA, parse_origin(str(folder)))
    assert torch.equal(opened.read(EMBEDDING), TENSORS[EMBEDDING].float())
    said = METHODS[method].get("quant_method")
    assert opened.notes == (
        f"config.json says that the weights are quantized (quant_method {said!r}), but all of them are floats and are "
        "read as such",
    )


def test_the_same_of_autogptqs_own_file(tmp_path):
    folder = write_folder(tmp_path / "c")
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}))
    (note,) = checkpoints.load(LLAMA, parse_origin(str(folder))).notes
    assert note.startswith("quantize_config.json says that the weights are quantized (quant_method 'gptq')")


# ── RoPE ────────────────────────────────────────────────────────────────────────────────────────────────────────────

DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
WITHOUT_THETA = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
WITHOUT_LENGTH = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
TWICE = "config.json: rope_theta is 10000.0 at the top and 500000.0 in {}, which is read, as transformers does"
DIFFER = "config.json: rope_scaling and rope_parameters differ; rope_scaling is read, as transformers does"
SPELLINGS = {
    "theta at the top and in rope_parameters": (
        {"rope_theta": 10000.0, "rope_parameters": DEFAULT}, (TWICE.format("rope_parameters"),)
    ),
    "theta at the top and in rope_scaling": (
        {"rope_theta": 10000.0, "rope_scaling": LLAMA3}, (TWICE.format("rope_scaling"),)
    ),
    "the same theta twice": ({"rope_theta": 500000.0, "rope_parameters": DEFAULT}, ()),
    "theta in rope_parameters alone": ({"rope_parameters": DEFAULT}, ()),
    "theta nowhere": ({}, ()),
    "scaling and parameters": ({"rope_scaling": WITHOUT_THETA, "rope_parameters": DEFAULT}, (DIFFER,)),
    "parameters of llama3": ({"rope_parameters": LLAMA3}, ()),
    "type and rope_type": ({"rope_scaling": LLAMA3 | {"type": "linear"}}, ()),
    "type alone": ({"rope_scaling": {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()}}, ()),
    "an original length at the top": (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 256}, ()
    ),
    "no original length": ({"rope_scaling": WITHOUT_LENGTH}, ()),
    "an original length beyond the model's": (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}, ()
    ),
    "linear by 1": ({"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, ()),
    "dynamic by 1": ({"rope_scaling": {"type": "dynamic", "factor": 1}}, ()),
    "a factor that the default kind does not read": ({"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, ()),
    "whole numbers": ({"rope_theta": 500000, "rope_scaling": {**WITHOUT_THETA, "factor": 8}}, ()),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rope_settings_are_joined_as_transformers_joins_them(tmp_path, spelling):
    fields, notes = SPELLINGS[spelling]
    folder = write_folder(tmp_path / "c")
    drop(folder, "rope_theta", "rope_scaling")
    set_config(folder, **fields)
    assert assert_as_transformers(folder).notes == notes


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_theta": "10000"}, 'rope_theta is "10000", expected a number'),
        ({"rope_theta": True}, "rope_theta is true, expected a number"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, 'factor is "8", expected a number'),
        ({"num_hidden_layers": "1"}, 'num_hidden_layers is "1", expected a number'),
        ({"head_dim": 0}, "head_dim"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"tie_word_embeddings": "true"}, 'tie_word_embeddings is "true", expected true or false'),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is null, expected true or false"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; only 1 is"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "expected one object of numbers"),
    ],
)
def test_settings_that_transformers_does_not_take_either_are_named(tmp_path, fields, words):
    set_config(write_folder(tmp_path / "c"), **fields)
    assert words in refusal(LLAMA, tmp_path / "c")


@pytest.mark.parametrize("fields", [{"num_key_value_heads": None, "num_attention_heads": 2, "head_dim": 32},
                                    {"head_dim": None}, {"torch_dtype": "float16", "dtype": "float32"}])  # fmt: skip
def test_what_a_config_leaves_out_is_what_transformers_puts_there(tmp_path, fields):
    folder = write_folder(tmp_path / "c")
    set_config(folder, **fields)
    if fields.get("num_key_value_heads", 1) is None:
        many = SMALL.model_copy(update={"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32})
        save_file({n: t.bfloat16() for n, t in weights(many).items()}, folder / FILE, {"format": "pt"})
    assert_as_transformers(folder)


@pytest.mark.parametrize(
    ("parts", "fields", "words"),
    [
        (
            {"qweight": torch.int32, "scales": torch.float16},
            {},
            "says nothing of quantization, but {}.qweight is a part",
        ),
        ({"weight_packed": torch.int32}, {}, "says nothing of quantization, but {}.weight_packed is a part"),
        ({"weight": torch.int8, "SCB": torch.float32}, {}, "says nothing of quantization, but {}.SCB is a part"),
        ({"weight": torch.uint32, "scales": torch.bfloat16}, {"quantization": {"bits": 4}}, "(quant_method 'mlx')"),
    ],
)
def test_integers_without_a_word_of_them_are_named(tmp_path, parts, fields, words):
    folder = write_folder(tmp_path / "c")
    stored = {name: tensor for name, tensor in TENSORS.items() if name != f"{UP}.weight"}
    save_file(stored | {f"{UP}.{part}": torch.zeros(2, 2, dtype=kind) for part, kind in parts.items()}, folder / FILE)
    set_config(folder, **fields)
    line = refusal(LLAMA, folder)
    assert line.startswith(f"{folder}/config.json: ")
    assert words.format(UP) in line


@pytest.mark.parametrize(("begin", "words"), [(b"GGUF", "is a GGUF file; give it under a name that ends in .gguf"),
                                              (b"PK\x03\x04", "is a zip archive, as `torch.save` writes too; unpack"),
                                              (b"\x1f\x8b", "is packed with gzip; unpack it")])  # fmt: skip
def test_another_form_under_this_name_is_named(tmp_path, begin, words):
    folder = write_folder(tmp_path / "c")
    for path in (folder / FILE, folder / "model.gguf"):
        path.write_bytes(begin + b"\1" * 600)
        if path.suffix != ".gguf" or begin != b"GGUF":
            place = path if path.suffix == ".gguf" else folder
            assert words in refusal(LLAMA, place)
