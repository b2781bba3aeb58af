"""What llama.cpp quantizes, our reader reads as llama.cpp does: the same numbers, and so the same logits."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from export import checkpoints as checkpoint
from export.checkpoints.gguf import ROPE_FACTORS, GgufSource, hugging_face_name
from export.checkpoints.integers import in_hugging_face_order
from export.checkpoints.origin import parse_origin
from export.plan import ModelSpec, load_named
from export.quantization.eager import eager
from runtime_tests.bench import exports, forms, runners
from runtime_tests.jobs import Opening
from tests.support.benchmarks import llama_cpp_logits
from tests.support.checkpoints import LLAMA
from tests.support.metrics import eager_logits, sqnr_db

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peers`)")
TINY = load_named(ModelSpec, "models", "tiny")
QUANTIZE = ("-m", "runtime_tests.bench.runners.llamacpp")
PREFILL = 30
TOKENS = list(range(3, 43))
# what llama.cpp makes of each of its recipes
MIXTURES = {
    "f16": {"F16"}, "bf16": {"BF16"}, "q8_0": {"Q8_0"}, "q4_0": {"Q4_0", "Q6_K"}, "q4_1": {"Q4_1", "Q6_K"},
    "q5_0": {"Q5_0", "Q6_K"}, "q5_1": {"Q5_1", "Q6_K"}, "q4_k_s": {"Q4_K", "Q5_K", "Q6_K"},
    "q4_k_m": {"Q4_K", "Q6_K"}, "q5_k_m": {"Q5_K", "Q6_K"}, "q6_k": {"Q6_K"},
}  # fmt: skip


class TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h, as far as it is needed."""

    _fields_ = [
        ("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ggml():
    path = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    library = ctypes.CDLL(str(path))
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    return library


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The tiny model, llama3 RoPE scaling included, as llama.cpp's own quantizer writes it."""
    folder = tmp_path_factory.mktemp("gguf")
    forms.write_gguf(checkpoint.load(TINY, None), folder)

    def make(kind):
        path = folder / f"{kind}.gguf"
        if not path.exists():
            exports.run((*QUANTIZE, str(folder / forms.GGUF), str(path), kind), folder / "log", kind)
        return path

    return make


def theirs(ggml, path):
    """Every tensor of a file as ggml itself dequantizes it, rows in Hugging Face's order."""
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        values = torch.empty(tuple(reversed(tensor.shape.tolist())))
        stored = np.ascontiguousarray(tensor.data)
        if tensor.tensor_type is gguf.GGMLQuantizationType.F32:
            values.numpy()[...] = stored
        else:
            traits = ggml.ggml_get_type_traits(int(tensor.tensor_type)).contents
            assert traits.type_name.decode().upper() == tensor.tensor_type.name
            traits.to_float(stored.ctypes.data, values.data_ptr(), values.numel())
        name = hugging_face_name(tensor.name)
        yield name, in_hugging_face_order(name, values, TINY.architecture)


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_number_is_the_one_ggml_computes(ggml, quantized, kind):
    source = GgufSource(quantized(kind))
    assert source.architecture == TINY.architecture
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(source.path).tensors}
    assert types - {"F32"} == MIXTURES[kind]
    assert all(part in source.description for part in MIXTURES[kind])
    names = set()
    for name, expected in theirs(ggml, source.path):
        assert torch.equal(source.read(name), expected), name
        names.add(name)
    assert names == set(TINY.architecture.tensor_shapes())


def our_logits(path):
    """After the prefill and after each further token, [S, V]."""
    return eager_logits(checkpoint.load(LLAMA, parse_origin(str(path))), TOKENS)[PREFILL - 1 :]


# llama.cpp rounds activations to bytes where weights are integers, to the weights' type where they are floats
LEAST_DB = {"f16": 50, "bf16": 38} | dict.fromkeys(["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"], 28)


@pytest.mark.parametrize("kind", MIXTURES)
def test_logits_are_llama_cpps_on_the_same_file(quantized, tmp_path, kind):
    assert sqnr_db(
        our_logits(quantized(kind)), llama_cpp_logits(quantized(kind), tmp_path, TOKENS, PREFILL)
    ) > LEAST_DB.get(kind, 25)


def test_in_float32_only_the_order_of_sums_differs(quantized, monkeypatch):
    """The cache, float16 by default, is float32 here too."""
    path = quantized("q8_0").parent / forms.GGUF
    module = runners.module("llamacpp")
    defaults = module.context_parameters

    def exact(opening):
        parameters = defaults(opening)
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return parameters

    monkeypatch.setattr(module, "context_parameters", exact)
    opening = Opening(runner="llamacpp", path=str(path), tokenizer="", context=256, threads=1)
    logits = module.open_runner(opening).logits(TOKENS, PREFILL)
    assert sqnr_db(our_logits(path), logits) > 100


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: {"rope_scaling": None},
        lambda a: {"rope_scaling": a.rope_scaling.model_copy(update={"original_max_position_embeddings": 8192})},
        lambda a: {"rms_norm_eps": 1e-2},
        lambda a: {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64},
    ],
)
def test_a_wrong_reading_of_the_file_would_be_seen(quantized, tmp_path, wrong):
    """The negative twin: the same weights in another architecture, far from llama.cpp's logits."""
    path = quantized("q8_0")
    weights = checkpoint.load(LLAMA, parse_origin(str(path)))
    other = weights.architecture.model_copy(update=wrong(weights.architecture))
    with torch.inference_mode():
        ours = eager(weights.read, other, "none")(torch.tensor([TOKENS]))[0][0, PREFILL - 1 :].numpy()
    assert sqnr_db(ours, llama_cpp_logits(path, tmp_path, TOKENS, PREFILL)) < 20


def test_the_weights_are_this_files_not_the_ones_it_was_made_from(quantized, tmp_path):
    theirs = llama_cpp_logits(quantized("q4_0"), tmp_path, TOKENS, PREFILL)
    unquantized = our_logits(quantized("q4_0").parent / forms.GGUF)
    assert sqnr_db(our_logits(quantized("q4_0")), theirs) > sqnr_db(unquantized, theirs) + 10


def test_rows_that_hold_no_whole_k_block_are_of_another_type(tmp_path, ggml):
    """As in SmolLM2: rows of 576 fall back to types in blocks of 32, all of which are read."""
    shapes = TINY.architecture.model_copy(update={"hidden_size": 288, "head_dim": 36})
    source = checkpoint.load(TINY.model_copy(update={"architecture": shapes}), None)
    forms.write_gguf(source, tmp_path)
    exports.run((*QUANTIZE, str(tmp_path / forms.GGUF), str(tmp_path / "q.gguf"), "q4_k_m"), tmp_path / "log", "q")
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert types >= {"Q4_K", "Q5_0"}  # down_proj has rows of 512
    assert (
        sqnr_db(our_logits(tmp_path / "q.gguf"), llama_cpp_logits(tmp_path / "q.gguf", tmp_path, TOKENS, PREFILL)) > 25
    )
