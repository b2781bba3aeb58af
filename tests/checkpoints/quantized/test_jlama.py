"""Jlama's JQ4 folders read back to the numbers their codes stand for; headers and parts with mistakes are named."""

from functools import partial

import gguf
import pytest
import torch
from safetensors import SafetensorError, safe_open

from export import checkpoints
from export.checkpoints import open_source, safetensors
from export.checkpoints.origin import parse_origin
from export.pipeline import export
from export.plan import load_plan
from export.toolbox import writers
from tests.support.checkpoints import LLAMA, SMALL, refusal, set_config, weights, write_jlama
from tests.support.harms import entry, header, raw

UNTIED = SMALL.model_copy(update={"tie_word_embeddings": False, "num_hidden_layers": 2})
UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def by_hand(data, scales, shape):
    """All values, one by one, as `get` of Q4ByteBufferTensor.java computes them."""
    values = torch.empty(shape)
    for i in range(values.numel()):
        block, place = divmod(i, 32)
        byte = data[block * 16 + place % 16]
        code = byte & 15 if place < 16 else byte >> 4
        values.view(-1)[i] = (code - 8) * scales.flatten()[block]
    return values


@pytest.mark.parametrize("rows_of_one", [True, False], ids=["norms as rows", "norms as vectors"])
@pytest.mark.parametrize("architecture", [SMALL, UNTIED], ids=["tied", "untied"])
def test_every_value_is_the_one_jlama_gets(tmp_path, architecture, rows_of_one):
    folder = write_jlama(tmp_path / "jq4", architecture)
    if not rows_of_one:
        header(lambda parts: [part.update(shape=[64]) for part in parts.values() if part["shape"] == [1, 64]])(folder)
    opened = checkpoints.load(LLAMA, parse_origin(str(folder)))
    assert opened.architecture == architecture
    matrices = 0
    for name, original in weights(architecture).items():
        values = opened.read(name)
        assert (values.dtype, values.shape) == (torch.float32, original.shape)
        if original.ndim == 1:
            assert torch.equal(values, original)
            continue
        matrices += 1
        data, scales = writers.jlama_blocks(original, "Q4")
        assert (scales < 0).any()
        assert (scales > 0).any()
        if matrices == 2:  # by hand is slow
            assert torch.equal(values, by_hand(data, scales, original.shape))
        assert ((values - original).abs().view(len(scales), -1, 32).amax(2) <= scales.abs() * 1.001).all()
    assert opened.source.description == (
        f"Hugging Face folder, Jlama Q4, {matrices} of {len(architecture.tensor_shapes())} tensors quantized"
    )


def test_the_order_of_nibbles_is_ggmls_q4_0(tmp_path):
    """A second opinion: the same codes as a Q4_0 block, dequantized by the `gguf` library."""
    folder = write_jlama(tmp_path / "jq4")
    parts = safetensors.read(folder / "model.safetensors")
    place, scales = parts[UP], parts[f"{UP}.qb"]
    data = (folder / "model.safetensors").read_bytes()
    codes = torch.frombuffer(bytearray(data[place.start : place.end]), dtype=torch.uint8).view(-1, 16)
    ones = torch.ones(len(codes), 1, dtype=torch.float16).view(torch.uint8)
    blocks = torch.cat([ones, codes], dim=1).numpy()
    integers = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0))
    factors = torch.frombuffer(bytearray(data[scales.start : scales.end]), dtype=torch.float32)
    expected = (integers * factors[:, None]).view(place.shape)
    assert torch.equal(open_source(parse_origin(str(folder)), None).read(UP), expected)
    swapped = (integers.view(-1, 2, 16).flip(1).reshape(-1, 32) * factors[:, None]).view(place.shape)
    assert not torch.equal(swapped, expected)


def test_the_8_bit_variant(tmp_path):
    opened = checkpoints.load(LLAMA, parse_origin(str(write_jlama(tmp_path / "ji8", kind="I8"))))
    assert "Jlama I8" in opened.source.description
    for name, original in weights().items():
        values = opened.read(name)
        if original.ndim == 2:
            data, scales = writers.jlama_blocks(original, "I8")
            codes = torch.frombuffer(bytearray(data), dtype=torch.int8).view(len(scales), -1, 32)
            assert torch.equal(values, (codes * scales[..., None]).view(original.shape))


def test_the_library_does_not_read_it(tmp_path):
    """Why there is a header reader of our own."""
    with pytest.raises(SafetensorError, match="Q4"):
        safe_open(write_jlama(tmp_path / "jq4") / "model.safetensors", framework="pt")


def test_an_artifact_is_built_from_it(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    built = export(
        load_plan("llama", "int4-g32", "onnx-cpu"), parse_origin(str(write_jlama(tmp_path / "jq4"))), tmp_path / "out"
    )
    assert built.checkpoint.description == "Hugging Face folder, Jlama Q4, 8 of 11 tensors quantized"


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


q4 = partial(entry, dtype="Q4")


def alone(start=0, end=4, shape=(1,)):
    """A file with one tensor of scales, and four bytes of data."""
    return raw({"a.qb": entry(list(shape), start, end, "F32")}, bytes(4))


QB = {"a.qb": entry([1, 1], 16, 20, "F32")}
GOOD = {"a": q4([1, 32], 0, 16), **QB}
HEADERS = {
    "not json": (raw(b'{"a.qb": not json}'), "Expecting value"),
    "not utf-8": (raw(b'"a.qb"\xff'), "damaged safetensors"),
    "a list": (raw(b'["a.qb"]'), "its header is a list"),
    "a number": (raw({"a.qb": 1}), "tensor a.qb: Input should be"),
    "many numbers": (
        raw(b"{" + b",".join(b'"%d":1' % i for i in range(300_000)) + b',"a.qb":1}'), "tensor 0: Input should be",
    ),
    "too deep": (raw(b'{"a.qb":' + b"[" * 10**6), "damaged safetensors"),
    "a name twice": (
        raw(b'{"a.qb": 1, "a.qb": 2}'), "'a.qb' is there twice",
    ),
    "unknown type": (raw(GOOD | {"a": entry([1, 32], 0, 16, "Q5")}, bytes(20)), "tensor a is of unknown type 'Q5'"),
    "no type": (raw({"a.qb": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "tensor a.qb: dtype: missing"),
    "an unknown key": (raw({"a.qb": entry([1], 0, 4, "F32") | {"strides": [1]}}, bytes(4)), "strides: unknown key"),
    "overlap": (raw(GOOD | {"a": q4([1, 40], 0, 20)}, bytes(20)), "a.qb begins at 16, the one before ends at 20"),
    "the same bytes twice": (raw(GOOD | {"b": q4([1, 32], 0, 16)}, bytes(20)), "begins at 0, the one before ends"),
    "a hole": (raw(GOOD | {"b": entry([1, 1], 24, 28, "F32")}, bytes(28)), "b begins at 24, the one before"),
    "a hole in front": (raw({"a.qb": entry([1, 1], 4, 8, "F32")}, bytes(8)), "a.qb begins at 4, the one before"),
    "a tail": (raw(GOOD, bytes(21)), "its tensors have 20 bytes, its data 21"),
    "data cut off": (raw(GOOD, bytes(19)), "its tensors have 20 bytes, its data 19"),
    "data beyond the file": (alone(end=2**32, shape=[2**30]), "its tensors have 4294967296 bytes"),
    "offsets turned": (alone(4, 0), "damaged safetensors"),
    "a negative offset": (alone(-4, 0), "greater than or equal to 0"),
    "an offset of 2^70": (alone(0, 2**70), "damaged safetensors"),
    "three offsets": (
        raw({"a.qb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)), "data_offsets: ",
    ),
    "an offset in words": (alone("0"), "valid integer"),
    "a shape in halves": (alone(shape=[0.5]), "valid integer"),
    "a shape of truth": (alone(shape=[True]), "valid integer"),
    "a negative shape": (alone(shape=[-1, -1]), "greater than or equal to 0"),
    "a shape that overflows": (alone(shape=[2**40, 2**40]), "has 4 bytes"),
    "a hundred dimensions": (alone(shape=[1] * 100), "at most 8 items"),
    "a shape that is not the size": (raw(GOOD | {"a": q4([1, 64], 0, 16)}, bytes(20)), "[1, 64] and type Q4 has"),
    "half a byte": (raw({"a": q4([1, 31], 0, 16), **QB}, bytes(20)), "[1, 31] and type Q4 has 16 bytes"),
    "an odd block": (
        raw({"a": q4([1, 8], 0, 4), "a.qb": entry([1, 1], 4, 8, "F32")}, bytes(8)), "no rows of blocks of 32",
    ),
    "three dimensions": (raw({"a": q4([1, 1, 32], 0, 16), **QB}, bytes(20)), "no rows of blocks of 32"),
    "an empty weight": (
        raw({"a": q4([0, 32], 0, 0), "a.qb": entry([0, 1], 0, 0, "F32")}), "no rows of blocks of 32",
    ),
    "no scales": (raw(GOOD | {"b": q4([1, 32], 20, 36)}, bytes(36)), "b is Q4, but its scales b.qb are"),
    "scales of nothing": (raw({"b.qb": entry([1, 1], 0, 4, "F32")}, bytes(4)), "b.qb holds scales of no quantized"),
    "scales of floats": (
        raw({"b": entry([1], 0, 4, "F32"), "b.qb": entry([1, 1], 4, 8, "F32")}, bytes(8)), "scales of no quantized",
    ),
    "scales in half": (
        raw({"a": q4([1, 32], 0, 16), "a.qb": entry([1, 1], 16, 18, "F16")}, bytes(18)), "is F16 of shape [1, 1]",
    ),
    "scales too many": (
        raw({"a": q4([1, 32], 0, 16), "a.qb": entry([1, 2], 16, 24, "F32")}, bytes(24)), "F32 of shape [1, 2]",
    ),
    "nothing of the model": (raw(GOOD, bytes(20)), "tensors are missing"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", HEADERS)
def test_a_header_that_contradicts_itself(tmp_path, mistake):
    folder = write_jlama(tmp_path / "jq4")
    spoil, words = HEADERS[mistake]
    spoil(folder)
    assert words in refusal(LLAMA, folder)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes(7), "shorter than a header"),
        ((2**63).to_bytes(8, "little"), "at most 4194304 are read"),
        ((5 * 2**20).to_bytes(8, "little") + b'"a.qb"' + b" " * 5 * 2**20, "at most 4194304 are read"),
        ((100).to_bytes(8, "little") + b'"a.qb"', "ends after the file"),
    ],
)
def test_a_length_that_the_file_cannot_hold(tmp_path, data, words):
    """Our reader names it; a folder with such a file counts as no Jlama folder, so the library reports it."""
    folder = write_jlama(tmp_path / "jq4")
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(Exception, match=words):
        safetensors.read(folder / "model.safetensors")
    assert "model.safetensors: damaged safetensors" in refusal(LLAMA, folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda h: h.update({f"{UP}x": h.pop(UP)}), f"{UP}.qb holds scales of no quantized tensor"),
        (lambda h: h.update({"x": h.pop(f"{UP}.qb")}), f"tensor {UP} is Q4, but its scales {UP}.qb are missing"),
        (lambda h: h[UP].update(shape=[64, 128]), "expected F32 of [64, 4]"),
        (
            lambda h: (h[UP].update(shape=[64, 128]), h[f"{UP}.qb"].update(shape=[64, 4])),
            "has shape [64, 128], the arch",
        ),
        (lambda h: h[UP].update(dtype="I8", shape=[128, 32]), "is F32 of shape [128, 2], expected F32 of [128, 1]"),
        (lambda h: h[UP].update(dtype="U8", shape=[128, 32]), "scales of no quantized tensor"),
        (
            lambda h: h["model.norm.weight"].update(dtype="U8", shape=[256]),
            "has shape [256], the architecture needs [64]",
        ),
        (lambda h: h["model.norm.weight"].update(shape=[64, 1]), "has shape [64, 1], the architecture needs [64]"),
        (
            lambda h: h.update({"model.layers.0.y": h.pop("model.norm.weight")}),
            "1 tensors are missing: model.norm.weight",
        ),
    ],
)
def test_parts_that_do_not_fit(tmp_path, edit, words):
    folder = write_jlama(tmp_path / "jq4")
    header(edit)(folder)
    assert words in refusal(LLAMA, folder)


def test_a_header_written_again_and_metadata_are_no_mistake(tmp_path):
    """The twin: a folder whose header was only written again opens."""
    folder = write_jlama(tmp_path / "jq4")
    header(lambda parts: parts.update({"__metadata__": {"format": "pt"}}))(folder)
    assert checkpoints.load(LLAMA, parse_origin(str(folder))).read(EMBEDDING).shape == (288, 64)


def test_infinite_scales_name_the_weight(tmp_path):
    folder = write_jlama(tmp_path / "jq4")
    place = safetensors.read(folder / "model.safetensors")[f"{UP}.qb"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[place.start : place.start + 4] = b"\x00\x00\x80\x7f"
    (folder / "model.safetensors").write_bytes(data)
    assert f"{UP} holds NaN or infinity" in refusal(LLAMA, folder)


def test_a_config_that_says_otherwise(tmp_path):
    folder = write_jlama(tmp_path / "jq4")
    set_config(folder, quantization_config={"quant_method": "awq"})
    line = "config.json: says that the weights are quantized, but the tensors are Jlama's; remove that"
    assert line in refusal(LLAMA, folder)
