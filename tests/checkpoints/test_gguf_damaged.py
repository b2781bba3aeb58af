"""GGUF files with mistakes, and files of every form damaged at random: one line, in bounded time and memory."""

import random
import resource
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch

from export import checkpoints, manifest
from export.checkpoints import open_source, tokenizer
from export.checkpoints.gguf import READABLE_TYPES
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host import processes
from export.plan import ModelSpec, load_named
from tests.support.checkpoints import (
    GGUF,
    LLAMA,
    META_SMALL,
    SMALL,
    metadata,
    read_everything,
    refusal,
    tokenizer_refusal,
    weights,
    write_bnb,
    write_folder,
    write_gguf,
    write_jlama,
    write_meta,
)
from tests.support.harms import claim, key, put
from tests.support.processes import within
from tests.support.reliability import NOT_DAMAGED

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("key", [key for key in metadata(SMALL) if key.startswith("llama.")])
def test_a_missing_key_is_named_or_has_llama_cpps_default(tmp_path, key):
    path = write_gguf(tmp_path / "model.gguf", leave_out=[key])
    if key == "llama.rope.freq_base":
        assert checkpoints.load(LLAMA, parse_origin(str(path))).architecture.rope_theta == 10000.0
    elif key.endswith("head_count_kv"):  # as many as query heads, which the tensors contradict
        assert "k_proj.weight has shape [32, 64]" in refusal(LLAMA, path)
    else:
        assert f"metadata key {key} is missing" in refusal(LLAMA, path)


@pytest.mark.parametrize("key", [key for key in metadata(SMALL) if key.startswith("tokenizer.")])
def test_a_missing_tokenizer_key_is_named(tmp_path, key):
    path = write_gguf(tmp_path / "model.gguf", leave_out=[key])
    text = tokenizer_refusal(path, tmp_path / "out")
    assert f"metadata key {key} is missing" in text or "pre-tokenizer 'default' is not supported" in text


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama.attention.head_count": "four"}, "llama.attention.head_count is 'four', expected int"),
        ({"llama.attention.head_count": 0}, "num_attention_heads"),
        ({"llama.embedding_length": [64]}, "llama.embedding_length is [64], expected int"),
        ({"llama.embedding_length": 32}, "has shape"),
        ({"llama.block_count": 2}, "tensors are missing"),
        ({"llama.block_count": 2**31}, "num_hidden_layers"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            "llama.rope.scaling.type is 'linear' with factor 2.0; only 'none' is supported",
        ),
        ({"llama.rope.scaling.factor": 4.0}, "'linear' with factor 4.0"),
        ({"llama.rope.scale_linear": 4.0}, "'linear' with factor 4.0"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, but heads have 16"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta"),
        ({"llama.context_length": 100}, "context_length 2048 is more than"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, extra, words):
    assert words in refusal(LLAMA, write_gguf(tmp_path / "model.gguf", extra=extra))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama' with pre-tokenizer 'smollm' is not supported"),
        ({"tokenizer.ggml.pre": "qwen2"}, "pre-tokenizer 'qwen2' is not supported"),
        ({"tokenizer.ggml.bos_token_id": 5000}, "bos_token_id is 5000, the file has 262 tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type has 1"),
        ({"tokenizer.ggml.tokens": ["a", "a", "b"]}, "the file has 3 tokens"),
        ({"tokenizer.ggml.tokens": ["a"] * 300}, "299 of its tokens are there twice"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens is 1, expected str"),
        ({"tokenizer.ggml.merges": ["no such"]}, "do not fit together"),
        ({"tokenizer.ggml.merges": ["nospace"]}, "do not fit together"),
        ({"tokenizer.chat_template": 5}, "tokenizer.chat_template is 5, expected str"),
    ],
)
def test_a_tokenizer_that_cannot_be_made(tmp_path, extra, words):
    path = write_gguf(tmp_path / "model.gguf", extra=extra)
    assert words in tokenizer_refusal(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (torch.ones(7), "has shape [7], heads have 8 rotary pairs"),
        (torch.ones(2, 4), "has shape [2, 4], heads have 8 rotary pairs"),
        (torch.full((8,), 2.0), "is not Llama 3's RoPE scaling"),  # linear
        (torch.linspace(1, 8, 8), "is not Llama 3's RoPE scaling"),
        (torch.linspace(8, 1, 8), "is not Llama 3's RoPE scaling"),
        (torch.full((8,), 0.5), "is not Llama 3's RoPE scaling"),
        (torch.zeros(8), "holds numbers that are no slowing factors"),
        (torch.full((8,), float("nan")), "holds numbers that are no slowing factors"),
        (torch.full((8,), float("inf")), "holds numbers that are no slowing factors"),
    ],
)
def test_rope_factors_that_are_not_llama3s(tmp_path, table, words):
    path = write_gguf(tmp_path / "model.gguf", more={"rope_freqs.weight": table})
    assert f"tensor rope_freqs.weight {words}" in refusal(LLAMA, path)


def test_other_models_adapters_and_parts_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    assert "general.type is 'adapter'" in refusal(LLAMA, write_gguf(path, extra={"general.type": "adapter"}))
    assert "one of 3 parts; join them" in refusal(LLAMA, write_gguf(path, extra={"split.count": 3}))
    write_gguf(path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba", 1))
    with pytest.raises(ExportError, match=r"damaged|only 'llama' is supported"):
        checkpoints.load(LLAMA, parse_origin(str(path)))


def test_nan_in_a_gguf_names_the_tensor(tmp_path):
    tensors = weights()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    path = write_gguf(tmp_path / "model.gguf", tensors=tensors)
    assert "model.layers.0.mlp.up_proj.weight holds NaN" in refusal(LLAMA, path)


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_the_readable_types_are_those_that_gguf_dequantizes_whatever_their_bytes(kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = 128 // size + 1
    data = np.random.default_rng(3).integers(0, 256, (40, count * size), np.uint8)
    if kind.name in READABLE_TYPES:
        assert gguf.quants.dequantize(data, kind).shape == (40, count * block)
    else:
        # raised by gguf, not by us, for a type without a decoder: READABLE_TYPES leaves out no other
        with pytest.raises(NotImplementedError, match=kind.name):
            gguf.quants.dequantize(data, kind)


@pytest.mark.parametrize("kind", ["Q8_1", "F64", "I8", "I16", "I32", "I64"])
def test_a_type_that_cannot_be_read_is_named_before_any_work(tmp_path, kind):
    path = write_gguf(tmp_path / "model.gguf")
    data, name = bytearray(path.read_bytes()), b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + struct.calcsize("<IQQ")  # behind the number of dimensions, and two of them
    struct.pack_into("<I", data, at, gguf.GGMLQuantizationType[kind])
    path.write_bytes(data)
    with pytest.raises(ExportError, match=rf"tensor {name.decode()} is of type {kind}, .* use a file in F32, F16"):
        open_source(parse_origin(str(path)), None)


@pytest.mark.parametrize("keys", [
    {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, {"llama.rope.scale_linear": 1.0},
    {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
])  # fmt: skip
def test_rope_that_is_scaled_by_nothing_is_read(tmp_path, keys):
    path = write_gguf(tmp_path / "model.gguf", extra=keys)
    assert checkpoints.load(LLAMA, parse_origin(str(path))).architecture == SMALL


def set_type(path, name, kind):
    """Change the number of a tensor's type in the header."""
    data = bytearray(path.read_bytes())
    at = data.index(name) + len(name) + struct.calcsize("<IQQ")  # behind the number of dimensions, and two of them
    struct.pack_into("<I", data, at, kind)
    path.write_bytes(data)


TAKE = "; take the model's file in Q4_0, Q4_K_M, Q8_0 or F16"


@NOT_DAMAGED
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (4, "4, Q4_2, which llama.cpp has withdrawn"),
        (31, "31, Q4_0_4_4, which llama.cpp has withdrawn"),
        (33, "33, Q4_0_8_8, which llama.cpp has withdrawn"),
        (36, "36, IQ4_NL_4_4 (or BitNet's I2_S), which llama.cpp has withdrawn"),
        (139, "139, IQ4_K of ik_llama.cpp, which llama.cpp does not have"),
        (153, "153, IQ2_KT of ik_llama.cpp, which llama.cpp does not have"),
        (202, "202, a type of ik_llama.cpp, which llama.cpp does not have"),
        (4_000_000_000, "4000000000, which is none of llama.cpp's"),
    ],
)
def test_types_of_other_times_and_programs_are_named(tmp_path, kind, words):
    path = write_gguf(tmp_path / "model.gguf", kind="Q4_0")
    set_type(path, b"blk.0.attn_q.weight", kind)
    assert refusal(LLAMA, path) == f"{path}: tensor 'blk.0.attn_q.weight' is of type {words}{TAKE}"


FORMS_OF_OTHERS = {
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF; convert it with `gguf-convert-endian"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), f"version 1, an older form of GGUF than 2 and 3{TAKE}"),
    "version 4": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), f"version 4, a newer form of GGUF than 2 and 3{TAKE}"),
    "GGJT": (b"tjgg" + bytes(60), f"a file of llama.cpp's form before GGUF{TAKE}"),
}


@NOT_DAMAGED
@pytest.mark.parametrize("form", FORMS_OF_OTHERS)
def test_forms_of_other_times_and_machines_are_not_damage(tmp_path, form):
    data, words = FORMS_OF_OTHERS[form]
    (path := tmp_path / "model.gguf").write_bytes(data)
    assert f"{path}: {words}" in refusal(LLAMA, path)


ABSURD = {
    "empty": put(GGUF, b""),
    "three bytes": put(GGUF, b"GGU"),
    "magic only": put(GGUF, b"GGUF"),
    "other magic": put(GGUF, b"GGML" + bytes(60)),
    "version 1": put(GGUF, b"GGUF" + struct.pack("<IQQ", 1, 0, 0)),
    "big endian": put(GGUF, b"GGUF" + struct.pack(">IQQ", 3, 0, 0)),
    "2^63 keys": claim(0, 2**63, bytes(64)),
    "2^63 tensors": claim(2**63, 0, bytes(64)),
    "50000 tensors of zeros": claim(50_000, 0, bytes(24 * 40_000)),
    "2^60 numbers": claim(0, 1, key(9, struct.pack("<IQ", 4, 2**60))),
    "2^60 numbers, aligned": claim(0, 1, key(9, struct.pack("<IQ", 0, 2**60)) + bytes(64)),
    "100 million bytes, claimed": claim(0, 1, key(9, struct.pack("<IQ", 0, 10**8))),
    "an endless string": claim(0, 1, key(8, struct.pack("<Q", 2**63))),
    "arrays in arrays": claim(0, 1, key(9, struct.pack("<IQ", 9, 1) * 10_000)),
    "unknown type": claim(0, 1, key(77, bytes(8))),
    "a billion dimensions": claim(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**30)),
    "no keys at all": claim(0, 0, b""),
}


@pytest.mark.reliability("GGUF headers with absurd counts", "one line, at once, in little memory")
@pytest.mark.parametrize("attack", ABSURD)
def test_absurd_counts_end_at_once_and_in_little_memory(tmp_path, attack):
    ABSURD[attack](tmp_path)
    before = processes.peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    with within(10):
        assert "model.gguf: " in refusal(LLAMA, tmp_path / "model.gguf")
    assert processes.peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) - before < 50_000_000


def test_the_largest_header_we_read_still_fits_llama3():
    from export.checkpoints.gguf import header

    assert header.MAX_ITEMS > 2 * (128_256 * 2 + 280_147)


# ── damage at random ────────────────────────────────────────────────────────────────────────────────────────────────


def damaged(data, seed):
    """40 truncations, then 60 flipped bits; half of those in the first kilobytes, where the structure is."""
    choose = random.Random(seed)
    for i in range(40):
        yield f"first {i}/40", data[: len(data) * i // 40 + choose.randrange(32)]
    for i in range(60):
        at = choose.randrange(min(len(data), 3000) if i % 2 else len(data))
        yield f"bit at {at}", data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :]


def write_form(form, place):
    """A checkpoint, and the file in it to damage."""
    if form == "gguf":
        return (path := write_gguf(place / "model.gguf", kind="Q8_0")), path
    if form == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        return write_bnb(place), place / "model.safetensors"
    if form == "jlama":
        return write_jlama(place), place / "model.safetensors"
    if form == "meta":
        return write_meta(place), place / "consolidated.00.pth"
    return write_folder(place), place / "model.safetensors"


@pytest.mark.reliability(
    "{form} checkpoints cut short or with one bit flipped", "refused, or weights of the right shapes"
)
@pytest.mark.parametrize("form", ["safetensors", "bitsandbytes", "gguf", "meta", "jlama"])
def test_damage_by_chance_is_refused_or_harmless(tmp_path, form, record_property):
    """A flipped bit in a weight cannot be detected; everything else must be, as ExportError and nothing else."""
    (tmp_path / "checkpoint").mkdir()
    place, path = write_form(form, tmp_path / "checkpoint")
    architecture = META_SMALL if form == "meta" else SMALL
    good, shapes = path.read_bytes(), architecture.tensor_shapes()
    lines = []
    with within(120):
        for damage, data in damaged(good, seed=5):
            path.write_bytes(data)
            try:
                tensors = read_everything(LLAMA, place)
                ids = tokenizer.write(
                    open_source(parse_origin(str(place)), None), fresh(tmp_path / "out"), architecture.vocab_size
                )
            except ExportError as error:
                lines.append(str(error))
                continue
            assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes, damage
            assert ids.eos_ids, damage
            assert len(data) == len(good), damage
    assert len(lines) >= 40
    assert not any("\n" in line for line in lines)
    record_property("cases", 100)
    record_property("note", f"{len(lines)} refused")


def fresh(folder):
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return folder


def test_the_command_refuses_a_damaged_file_of_the_default_model(tmp_path):
    model = load_named(ModelSpec, "models", "smollm2-135m")
    (tmp_path / "cut.gguf").write_bytes(parse_origin(model.source).path.read_bytes()[:30_000_000])
    done = subprocess.run(
        [sys.executable, "-m", "export", "smollm2-135m", "int4-g32", "onnx-cpu", "--source", tmp_path / "cut.gguf",
         "--out", tmp_path / "out"], cwd=manifest.ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (done.returncode, len(errors)) == (1, 1)
    assert "cut.gguf: damaged GGUF" in errors[0]
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf"]


def test_every_key_is_read_as_by_the_library(tmp_path):
    write_gguf(tmp_path / GGUF)
    metadata = open_source(parse_origin(str(tmp_path / GGUF)), None).metadata
    fields = gguf.GGUFReader(tmp_path / GGUF).fields
    for name, value in ((name, field.contents()) for name, field in fields.items() if not name.startswith("GGUF.")):
        read = metadata.array(name, type(value[0])) if isinstance(value, list) else metadata.get(name, type(value))
        assert read == value
    assert sum(isinstance(field.contents(), list) for field in fields.values()) >= 3
