"""A checkpoint's own 4-bit integers in an ONNX file: no integer, no scale and no sign of one changes."""

import gguf
import numpy as np
import pytest
import torch

from export import checkpoint, manifest
from export.backends import onnx_kv
from export.backends._onnx_weights import shortest
from export.errors import ExportError
from export.model_checks import wrong_scales
from export.pipeline import export
from export.plan import load_plan
from export.quantize import eager
from export.sources.gguf_integers import integers_of
from runtime_tests.session import open_session

from .checkpoints import LLAMA, weights, write_folder, write_gguf, write_jlama

RECIPE = "int4-g32-exact"
LINEAR, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
TOKENS = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(1)).tolist()


def blocks(kind, rows=6, columns=512):
    """What a file of that type may hold: any codes, scales of both signs."""
    random = np.random.default_rng(0)
    values = random.standard_normal((rows, columns)).astype(np.float32)
    if kind != "Q6_K":
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    found = random.integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)  # the library cannot write it
    found[..., 208:] = random.uniform(-0.1, 0.1, (rows, columns // 256, 1)).astype(np.float16).view(np.uint8)
    return found.reshape(rows, -1)


@pytest.mark.parametrize(("kind", "bits", "group"), [("Q4_0", 4, 32), ("Q8_0", 8, 32), ("Q6_K", 6, 16)])
def test_integers_and_scales_are_what_the_blocks_stand_for(kind, bits, group):
    data, number = blocks(kind), gguf.GGMLQuantizationType[kind]
    found = integers_of(data, number)
    assert (found.bits, found.group_size) == (bits, group)
    assert -(2 ** (bits - 1)) <= int(found.qdata.min()) < int(found.qdata.max()) < 2 ** (bits - 1)
    product = found.qdata * found.scale.repeat_interleave(group, 1)
    assert torch.equal(product, torch.from_numpy(gguf.quants.dequantize(data, number)))
    assert bool((found.scale < 0).any()) == (kind != "Q8_0")


def test_a_type_with_minima_has_none():
    assert integers_of(blocks("Q4_1"), gguf.GGMLQuantizationType.Q4_1) is None


def q4_0(folder):
    return write_gguf(folder / "q4_0.gguf", kind="Q4_0")


def jq4(folder):
    return write_jlama(folder / "jq4")


@pytest.fixture(params=[q4_0, jq4], ids=["GGUF Q4_0", "Jlama Q4"])
def source(request, tmp_path):
    return checkpoint.load(LLAMA, str(request.param(tmp_path)))


def built(source, folder, target="onnx-cpu", recipe=RECIPE):
    return export(load_plan("llama", recipe, target), source.origin, folder)


def test_every_number_in_the_file_is_the_checkpoints(source, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    described = built(source, tmp_path / "out")
    assert described.quantization.from_checkpoint == "kept the checkpoint's integers of 8 of 8 weights"
    assert {layer.max_abs_error for layer in described.quantization.layers} == {0.0}
    negative = 0
    for weight in onnx_kv.read_weights(tmp_path / "out/model.onnx", source.architecture):
        group = weight.qdata.shape[1] // weight.scale.shape[1]
        product = weight.qdata * np.repeat(weight.scale, group, 1)
        np.testing.assert_array_equal(product, source.read(weight.name).numpy(), err_msg=weight.name)
        negative += int((weight.scale < 0).sum())
    assert negative

    session = open_session(tmp_path / "out", manifest.read(tmp_path / "out"), threads=1)
    got = torch.tensor(np.array([session.feed(TOKENS[:16])] + [session.feed([token]) for token in TOKENS[16:]]))
    with torch.no_grad():
        logits, _ = eager(source.read, source.architecture, "none")(torch.tensor([TOKENS]))
    want = logits[0, 15:]
    assert want.square().sum() > 300 * (want - got).square().sum()  # 25 dB: the runtime rounds activations to int8


def test_an_ordinary_recipe_rounds_again_and_says_why(source, tmp_path):
    described = built(source, tmp_path / "out", recipe="int4-g32")
    assert described.quantization.from_checkpoint.startswith("kept the checkpoint's integers of 0 of 8 weights")
    assert "not of 7: negative scales, which only onnxruntime multiplies by" in described.quantization.from_checkpoint
    assert min(layer.sqnr_db for layer in described.quantization.layers if layer.bits == 4) < 40


@pytest.mark.parametrize("target", ["executorch-xnnpack", "coreml"])
def test_runtimes_that_take_fewer_scales_are_refused(tmp_path, target):
    pytest.importorskip({"coreml": "coremltools"}.get(target, "executorch"), reason="the exporter is not installed")
    with pytest.raises(ExportError, match=f"recipe 'int4-g32-exact' on '{target}': .* use the target onnx-cpu"):
        built(checkpoint.load(LLAMA, str(q4_0(tmp_path))), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda folder: write_folder(folder / "floats"), "floats, or integers with minima or uneven levels"),
        (lambda folder: write_gguf(folder / "q4_1.gguf", kind="Q4_1"), "floats, or integers with minima"),
        (lambda folder: write_gguf(folder / "q8_0.gguf", kind="Q8_0"), "8 bits do not fit a recipe of 4"),
    ],
    ids=["floats", "minima", "more bits"],
)
def test_a_linear_that_cannot_be_kept_is_named(tmp_path, write, reason):
    with pytest.raises(ExportError) as caught:
        built(checkpoint.load(LLAMA, str(write(tmp_path))), tmp_path / "out")
    assert LINEAR in str(caught.value)
    assert reason in str(caught.value)


def test_an_embedding_in_floats_is_rounded_and_the_manifest_says_so(tmp_path):
    tensors = weights()
    path = tmp_path / "mixed.gguf"
    write_gguf(path, kind="Q4_0", tensors=tensors, floats=(EMBEDDING,))
    described = built(checkpoint.load(LLAMA, str(path)), tmp_path / "out")
    layers = {layer.name: layer for layer in described.quantization.layers}
    assert (layers[EMBEDDING].kept, layers[LINEAR].kept) == (False, True)
    assert layers[EMBEDDING].not_kept == "floats, or integers with minima or uneven levels"


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
