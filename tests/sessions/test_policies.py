"""Policies of the KV cache: what each artifact computes, over several windows, against the eager model."""

import numpy as np
import pytest
import torch

from export import checkpoints, manifest
from export.quantization.eager import eager
from runtime_tests.chat.conversation import PrefixCache
from runtime_tests.sessions.base import ContextError
from tests.support.artifacts import opened
from tests.support.metrics import random_tokens

CONTEXT, WINDOW = 1024, 24
TOKENS = random_tokens(900, vocab=250)


@pytest.fixture(scope="module")
def expected(tiny):
    """Logits after each token, each attending to the last WINDOW."""
    weights = checkpoints.load(manifest.read(tiny("onnx-cpu", "fp32")).plan.model, None)
    with torch.no_grad():
        return eager(weights.read, weights.architecture, "none", WINDOW)(torch.tensor([TOKENS]))[0][0].numpy()


def windowed(tiny, target, kind=None):
    return opened(tiny(target, "fp32", kind, f"window-{WINDOW}", context_length=CONTEXT))


@pytest.mark.parametrize(("target", "kind", "most"), [("onnx-cpu", None, 2e-5), ("onnx-cpu", "int8", 5e-2)])
@pytest.mark.parametrize("pieces", [[700, *[1] * 200], [7] * 128, [900], [20, 4, 1, 300, 1, 1, 573]])
def test_a_window_is_exact_whatever_the_pieces_are(tiny, expected, target, kind, most, pieces):
    session, scale = windowed(tiny, target, kind), np.abs(expected).max()
    for piece in pieces:
        logits = session.feed(TOKENS[session.position : session.position + piece])
        assert np.abs(logits - expected[session.position - 1]).max() <= most * scale


@pytest.mark.parametrize("target", ["onnx-cpu"])
def test_a_rewind_is_exact_or_refused(tiny, expected, target):
    session, scale = windowed(tiny, target), np.abs(expected).max()
    session.feed(TOKENS[:620])
    assert 0 < session.earliest < 620
    with pytest.raises(
        ContextError, match=rf"^no rewinding to 30 tokens: .*, from {session.earliest} on it is possible$"
    ):
        session.rewind(30)
    for length in (600, session.earliest, session.earliest + 3):
        session.rewind(length)
        for piece in (1, 5, 40):
            logits = session.feed(TOKENS[session.position : session.position + piece])
            assert np.abs(logits - expected[session.position - 1]).max() <= 2e-5 * scale
    session.rewind(session.earliest)
    with pytest.raises(ContextError):
        session.rewind(session.earliest - 1)
    session.reset()
    session.feed(TOKENS[:60])
    session.rewind(1)
    assert np.abs(session.feed(TOKENS[1:9]) - expected[8]).max() <= 2e-5 * scale


def test_onnxruntime_genai_computes_with_the_same_window(tiny, expected):
    import onnxruntime_genai as og

    model = og.Model(str(tiny("onnx-cpu", "fp32", None, f"window-{WINDOW}", context_length=CONTEXT)))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=CONTEXT)
    generator = og.Generator(model, parameters)
    for start, end in ((0, 500), (500, 501), (501, 502), (502, 890)):
        generator.append_tokens(np.array(TOKENS[start:end], np.int32))
        logits = generator.get_logits()[0, -1]
        assert np.abs(logits - expected[end - 1]).max() <= 2e-5 * np.abs(expected).max()


def test_a_prompt_that_parts_before_the_window_is_fed_again(tiny, expected):
    cache = PrefixCache(windowed(tiny, "onnx-cpu"))
    cache.feed([*TOKENS[:500], 3, 4, 5], lambda: False)
    assert cache.share([*TOKENS[:500], *TOKENS[500:510]]) == 500
    logits = cache.feed(TOKENS[500:510], lambda: False)
    assert np.abs(logits - expected[509]).max() <= 2e-5 * np.abs(expected).max()
    assert cache.share([*TOKENS[:100], 5]) == 0
    logits = cache.feed(TOKENS[:70], lambda: False)
    assert np.abs(logits - expected[69]).max() <= 2e-5 * np.abs(expected).max()
