"""A checkpoint's own 4-bit integers in an ONNX file: no integer, no scale and no sign of one changes."""

import gguf
import numpy as np
import pytest
import torch

from export import checkpoints
from export.checkpoints.gguf import integers_of
from export.checkpoints.integers import Unfit, values_of
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.formats.onnx_kv.weights import pack, read_weights, shortest, unpack
from export.pipeline import export
from export.plan import QuantRecipe, load_plan
from export.toolbox import model_checks
from export.toolbox.model_checks import wrong_scales
from tests.support.artifacts import opened
from tests.support.checkpoints import LLAMA, weights, write_bnb, write_folder, write_gguf, write_jlama
from tests.support.metrics import eager_logits, forced_logits, sqnr_db

RECIPE = "int4-g32-exact"
LINEAR, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
TOKENS = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(1)).tolist()


def blocks(kind, rows=6, columns=512):
    """What a file of that type may hold: any codes, scales of both signs."""
    random = np.random.default_rng(0)
    values = random.standard_normal((rows, columns)).astype(np.float32)
    if kind != "Q6_K":
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    integers = random.integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)  # the library cannot write it
    integers[..., 208:] = random.uniform(-0.1, 0.1, (rows, columns // 256, 1)).astype(np.float16).view(np.uint8)
    return integers.reshape(rows, -1)


@pytest.mark.parametrize(("kind", "bits", "group"), [("Q4_0", 4, 32), ("Q8_0", 8, 32), ("Q6_K", 6, 16)])
def test_integers_and_scales_are_what_the_blocks_stand_for(kind, bits, group):
    data, number = blocks(kind), gguf.GGMLQuantizationType[kind]
    integers = integers_of(data, number)
    assert (integers.bits, integers.group_size) == (bits, group)
    assert -(2 ** (bits - 1)) <= int(integers.qdata.min()) < int(integers.qdata.max()) < 2 ** (bits - 1)
    product = integers.qdata * integers.scale.repeat_interleave(group, 1)
    assert torch.equal(product, torch.from_numpy(gguf.quants.dequantize(data, number)))
    assert bool((integers.scale < 0).any()) == (kind != "Q8_0")


def test_a_type_with_minima_has_none():
    integers = integers_of(blocks("Q4_1"), gguf.GGMLQuantizationType.Q4_1)
    assert integers == Unfit("Q4_1 blocks, which have minima or uneven levels")
    assert integers_of(blocks("F16"), gguf.GGMLQuantizationType.F16) is None


def q4_0(folder):
    return write_gguf(folder / "q4_0.gguf", kind="Q4_0")


def jq4(folder):
    return write_jlama(folder / "jq4")


@pytest.fixture(params=[q4_0, jq4], ids=["GGUF Q4_0", "Jlama Q4"])
def source(request, tmp_path):
    return checkpoints.load(LLAMA, parse_origin(str(request.param(tmp_path))))


def built(source, folder, target="onnx-cpu", recipe=RECIPE):
    return export(load_plan("llama", recipe, target), source.origin, folder)


def test_every_number_in_the_file_is_the_checkpoints(source, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    described = built(source, tmp_path / "out")
    assert described.quantization.from_checkpoint == "kept the checkpoint's integers of 8 of 8 weights"
    assert {layer.max_abs_error for layer in described.quantization.layers} == {0.0}
    negative = 0
    for weight in read_weights(tmp_path / "out/model.onnx", source.architecture):
        group = weight.qdata.shape[1] // weight.scale.shape[1]
        product = weight.qdata * np.repeat(weight.scale, group, 1)
        np.testing.assert_array_equal(product, source.read(weight.name).numpy(), err_msg=weight.name)
        negative += int((weight.scale < 0).sum())
    assert negative

    got = forced_logits(opened(tmp_path / "out"), TOKENS, 16)
    assert sqnr_db(eager_logits(source, TOKENS)[15:], got) > 25  # the runtime rounds activations to int8


def test_an_ordinary_recipe_rounds_again_and_says_why(source, tmp_path):
    described = built(source, tmp_path / "out", recipe="int4-g32")
    assert described.quantization.from_checkpoint.startswith("kept the checkpoint's integers of 0 of 8 weights")
    assert "not of 7: negative scales, which only onnxruntime multiplies by" in described.quantization.from_checkpoint
    assert min(layer.sqnr_db for layer in described.quantization.layers if layer.bits == 4) < 40


@pytest.mark.parametrize("target", ["executorch-xnnpack", "coreml"])
def test_runtimes_that_take_fewer_scales_are_refused(tmp_path, target):
    pytest.importorskip({"coreml": "coremltools"}.get(target, "executorch"), reason="the exporter is not installed")
    with pytest.raises(ExportError, match=f"recipe 'int4-g32-exact' on '{target}': .* use the target onnx-cpu"):
        built(checkpoints.load(LLAMA, parse_origin(str(q4_0(tmp_path)))), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda folder: write_gguf(folder / "q4_1.gguf", kind="Q4_1"), "Q4_1 blocks, which have minima"),
        (lambda folder: write_gguf(folder / "q8_0.gguf", kind="Q8_0"), "8 bits do not fit a recipe of 4"),
        (lambda folder: write_bnb(folder / "bnb"), "NF4 levels do not fit a recipe of integers"),
    ],
    ids=["minima", "more bits", "other levels"],
)
def test_a_linear_that_cannot_be_kept_is_named(tmp_path, write, reason):
    with pytest.raises(ExportError) as caught:
        built(checkpoints.load(LLAMA, parse_origin(str(write(tmp_path)))), tmp_path / "out")
    assert LINEAR in str(caught.value)
    assert reason in str(caught.value)


def test_an_embedding_in_floats_is_rounded_and_the_manifest_says_so(tmp_path):
    tensors = weights()
    path = tmp_path / "mixed.gguf"
    write_gguf(path, kind="Q4_0", tensors=tensors, floats=(EMBEDDING,))
    described = built(checkpoints.load(LLAMA, parse_origin(str(path))), tmp_path / "out")
    layers = {layer.name: layer for layer in described.quantization.layers}
    assert (layers[EMBEDDING].kept, layers[LINEAR].kept) == (False, True)
    assert described.quantization.from_checkpoint == "kept the checkpoint's integers of 7 of 7 weights"


def test_floats_alone_are_nothing_to_keep(tmp_path):
    with pytest.raises(ExportError, match="holds floats, so recipe 'int4-g32-exact' has nothing to keep"):
        built(checkpoints.load(LLAMA, parse_origin(str(write_folder(tmp_path / "floats")))), tmp_path / "out")


# ── bitsandbytes' levels ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_are_levels_times_absmax(tmp_path, kind, nested):
    opened = checkpoints.load(LLAMA, parse_origin(str(write_bnb(tmp_path / "bnb", kind=kind, nested=nested))))
    held = opened.integers(LINEAR)
    assert (held.levels, held.bits, held.group_size) == (kind, 4, 64)
    product = values_of(held.qdata, held.levels) * held.scale.repeat_interleave(64, 1)
    assert torch.equal(product, opened.read(LINEAR))
    assert opened.integers(EMBEDDING) is None


def test_blocks_that_go_on_in_the_next_row_are_not_groups(tmp_path):
    opened = checkpoints.load(LLAMA, parse_origin(str(write_bnb(tmp_path / "bnb", blocksize=4096))))
    assert opened.integers(LINEAR) == Unfit("blocks of 4096 that go on in the next row")


def test_nf4_stays_nf4_and_a_linear_in_bf16_stays_float(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    source = checkpoints.load(
        LLAMA, parse_origin(str(write_bnb(tmp_path / "bnb", keep=("model.layers.0.mlp.down_proj",))))
    )
    described = built(source, tmp_path / "out", recipe="nf4-exact")
    assert described.quantization.from_checkpoint == "kept the checkpoint's integers of 6 of 6 weights"
    assert described.lowering["matmul_bnb4_nodes"] == 3  # q/k/v and gate/up are stacked
    assert described.lowering["float_matmul_nodes"] == 1
    names = []
    for weight in read_weights(tmp_path / "out/model.onnx", source.architecture):
        names.append(weight.name)
        held = source.integers(weight.name)
        if held is not None:
            np.testing.assert_array_equal(weight.qdata, held.qdata.numpy(), err_msg=weight.name)
            np.testing.assert_array_equal(weight.scale, held.scale.numpy(), err_msg=weight.name)
    assert len(names) == 7
    assert model_checks.check(tmp_path / "out") == []

    got = forced_logits(opened(tmp_path / "out"), TOKENS, 16)
    assert sqnr_db(eager_logits(source, TOKENS)[15:], got) > 25


def test_a_swapped_nibble_shows(tmp_path):
    source = checkpoints.load(LLAMA, parse_origin(str(write_bnb(tmp_path / "bnb"))))
    held = source.integers(LINEAR).qdata.numpy()
    packed = pack(held, 4, "nf4")
    assert np.array_equal(unpack(packed, 4, "nf4"), held)
    assert not np.array_equal(unpack(packed, 4, "even"), held)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "rtn"}, "need method kept"),
        ({"embedding": {"bits": 4, "group_size": 64, "levels": "nf4"}}, "embedding and head have no operator"),
        ({"linear": {"bits": 8, "group_size": 64, "levels": "nf4"}}, "levels other than even are of 4 bits"),
    ],
)
def test_recipes_that_no_runtime_has(fields, words):
    recipe = load_plan("llama", "nf4-exact", "onnx-cpu").quant
    with pytest.raises(ValueError, match=words):
        QuantRecipe.model_validate(recipe.model_dump() | fields)


def test_scales_are_stored_in_the_shortest_exact_type():
    assert shortest(torch.tensor([[0.5, -0.25]]), common=False).dtype.name == "bfloat16"
    assert shortest(torch.tensor([[1.001]]).half().float(), common=False).dtype == np.float16
    assert shortest(torch.tensor([[1.0001]]), common=False).dtype == np.float32


def test_verify_wants_numbers_and_from_other_recipes_more():
    negative, not_a_number = np.array([[-0.5]], np.float32), np.array([[np.nan]], np.float32)
    assert wrong_scales(negative, common=False) is None
    assert wrong_scales(negative, common=True) == "1 scales that are not positive numbers"
    assert wrong_scales(not_a_number, common=False) == "1 scales that are not numbers"
    assert wrong_scales(np.array([[0.1]], np.float32), common=True) == "1 scales that are no bfloat16"
