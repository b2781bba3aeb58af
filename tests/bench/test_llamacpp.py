"""llama.cpp as a peer: the same weights give the same logits, quantized ones are near, and a bad file is refused."""

import pytest

from export import checkpoints as checkpoint
from export.plan import ModelSpec, load_named
from runtime_tests.bench import exports, forms, runners
from runtime_tests.jobs import Opening
from tests.support.benchmarks import llama_cpp_logits
from tests.support.metrics import eager_logits, sqnr_db

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peers`)")
PREFILL = 30
TOKENS = list(range(3, 43))


@pytest.fixture(scope="module")
def tiny():
    return checkpoint.load(load_named(ModelSpec, "models", "tiny"), None)


@pytest.fixture(scope="module")
def exact(tiny, tmp_path_factory):
    """The tiny model, llama3 RoPE scaling included, in float32."""
    folder = tmp_path_factory.mktemp("gguf")
    forms.write_gguf(tiny, folder)
    return folder / forms.GGUF


@pytest.fixture(scope="module")
def our_logits(tiny):
    """After the prefill and after each further token, [S, V]."""
    return eager_logits(tiny, TOKENS)[PREFILL - 1 :]


def opening(path):
    return Opening(runner="llamacpp", path=str(path), tokenizer="", context=256, threads=1)


def opened(path):
    return runners.module("llamacpp").open_runner(opening(path))


def test_the_form_means_the_same_model_in_llama_cpp(exact, our_logits):
    """Prefill and single tokens; the cache is float16 by default."""
    logits = opened(exact).logits(TOKENS, PREFILL)
    assert logits.shape == our_logits.shape
    assert sqnr_db(our_logits, logits) > 50
    assert opened(exact).prompt(TOKENS).tokens == len(TOKENS)
    assert opened(exact).generate(TOKENS, 5).tokens == 5


def test_a_long_prompt_is_fed_in_pieces(exact, our_logits, monkeypatch):
    module = runners.module("llamacpp")
    monkeypatch.setattr(module, "PIECE", 7)
    assert sqnr_db(our_logits, opened(exact).logits(TOKENS, PREFILL)) > 50


@pytest.mark.parametrize(("kind", "least_db"), [("q4_0", 8), ("q4_k_m", 9), ("q8_0", 25)])
def test_llama_cpps_own_mixtures_load_and_are_near(exact, our_logits, tmp_path, kind, least_db):
    recipe = exports.RECIPES[f"llamacpp-{kind}"]
    arguments = [part.format(gguf=exact.parent, out=tmp_path) for part in recipe.arguments]
    exports.run(("-m", recipe.module, *arguments), tmp_path / "log", kind)
    logits = llama_cpp_logits(tmp_path / "model.gguf", tmp_path, TOKENS, PREFILL)
    assert sqnr_db(our_logits, logits) > least_db


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"bad\.gguf: llama\.cpp cannot load it"):
        opened(tmp_path / "bad.gguf")


def test_feeding_past_the_context_is_an_error(exact):
    with pytest.raises(ValueError, match="257 tokens at position 0: the context holds 256"):
        opened(exact).prompt(range(257))
