"""Policies of the KV cache: what each artifact computes, over several windows, against the eager model."""

import numpy as np
import pytest
import torch

from export import checkpoints, manifest
from export.model import rope_tables, rotate, without
from export.quantization.eager import eager
from runtime_tests.chat.conversation import PrefixCache
from runtime_tests.coreml.package import PackageError
from runtime_tests.sessions import saved
from runtime_tests.sessions.base import ContextError, leaving
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


@pytest.mark.parametrize(
    ("target", "kind", "most"),
    [
        ("onnx-cpu", None, 2e-5),
        ("onnx-cpu", "int8", 5e-2),
        ("executorch-xnnpack", None, 2e-5),
        ("executorch-xnnpack", "bfloat16", 2e-2),
        ("executorch-xnnpack", "int8", 5e-2),
        ("coreml", None, 5e-3),
    ],
)
@pytest.mark.parametrize("pieces", [[700, *[1] * 200], [7] * 128, [900], [20, 4, 1, 300, 1, 1, 573]])
def test_a_window_is_exact_whatever_the_pieces_are(tiny, expected, target, kind, most, pieces):
    session, scale = windowed(tiny, target, kind), np.abs(expected).max()
    for piece in pieces:
        logits = session.feed(TOKENS[session.position : session.position + piece])
        assert np.abs(logits - expected[session.position - 1]).max() <= most * scale


@pytest.mark.parametrize(("target", "most"), [("onnx-cpu", 2e-5), ("executorch-xnnpack", 2e-5), ("coreml", 5e-3)])
def test_a_rewind_is_exact_or_refused(tiny, expected, target, most):
    session, scale = windowed(tiny, target), np.abs(expected).max()
    session.feed(TOKENS[:620])
    assert 0 < session.earliest < 620
    with pytest.raises(
        ContextError, match=rf"^no rewinding to 30 tokens: .*, from {session.earliest} on it is possible$"
    ):
        session.rewind(30)
    for length in (lambda: 600, lambda: session.earliest, lambda: session.earliest + 3):
        session.rewind(length())
        for piece in (1, 5, 40):
            logits = session.feed(TOKENS[session.position : session.position + piece])
            assert np.abs(logits - expected[session.position - 1]).max() <= most * scale
    session.rewind(session.earliest)
    with pytest.raises(ContextError):
        session.rewind(session.earliest - 1)
    session.rewind(0)
    session.feed(TOKENS[:60])
    session.rewind(1)
    assert np.abs(session.feed(TOKENS[1:9]) - expected[8]).max() <= most * scale


def test_a_call_that_would_go_round_does_not_answer(tiny):
    """A package writes a call's tokens by one slice: our session ends calls where slots begin anew, others must too."""
    session = windowed(tiny, "coreml")
    session.feed(TOKENS[: session.room - 3])
    with pytest.raises(PackageError, match=r"slice_update.*: slice 277:282:1 of dimension 3, which has 280$"):
        session.step(TOKENS[:5], session.position)


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


SINK, SHORT = 5, 64
"""Tokens that never leave, and the context of endless text: it is full seven times."""
ENDLESS = TOKENS[:280]


@pytest.fixture(scope="module")
def attended(tiny):
    """Logits after each token of endless text, by a cache of keys before RoPE, each turned where it is used."""
    weights = checkpoints.load(manifest.read(tiny("onnx-cpu", "fp32")).plan.model, None)
    model = eager(weights.read, weights.architecture, "none")
    cos, sin = rope_tables(weights.architecture, SHORT)
    heads, kept, rows = weights.architecture.head_dim, [[] for _ in model.model.layers], []
    with torch.no_grad():
        for token in ENDLESS:
            if len(kept[0]) == SHORT:
                for layer in kept:
                    del layer[SINK : SINK + (SHORT - SINK) // 2]
            x = model.model.embed_tokens(torch.tensor([[token]]))
            for layer, cache in zip(model.model.layers, kept, strict=True):
                h, own = layer.input_layernorm(x), layer.self_attn
                q, k, v = (p(h).view(1, 1, -1, heads).transpose(1, 2) for p in (own.q_proj, own.k_proj, own.v_proj))
                cache.append((k, v))
                keys, values = (torch.cat(part, 2) for part in zip(*cache, strict=True))
                end = len(cache)
                q, keys = rotate(q, cos[end - 1 : end], sin[end - 1 : end]), rotate(keys, cos[:end], sin[:end])
                out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
                x = x + own.o_proj(out.transpose(1, 2).reshape(1, 1, -1))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            rows.append(model.lm_head(model.model.norm(x))[0, 0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("target", ["onnx-cpu", "executorch-xnnpack"])
@pytest.mark.parametrize("pieces", [[1] * 280, [70, *[1] * 100, 110], [280], [7] * 40])
def test_endless_text_is_exact_whatever_the_pieces_are(tiny, attended, target, pieces):
    session = opened(tiny(target, "fp32", None, f"sink-{SINK}", context_length=SHORT))
    fed = 0
    for piece in pieces:
        logits = session.feed(ENDLESS[fed : fed + piece])
        fed += piece
        assert np.abs(logits - attended[fed - 1]).max() <= 2e-5 * np.abs(attended).max()
    assert session.tokens == [*ENDLESS[:SINK], *ENDLESS[SINK + len(session.left) :]]
    assert session.left == ENDLESS[SINK : SINK + len(session.left)]


def test_a_cache_that_is_not_its_tokens_prefix_is_not_saved(tiny, tmp_path):
    session = opened(tiny("onnx-cpu", "fp32", None, f"sink-{SINK}", context_length=SHORT))
    session.feed(ENDLESS[:SHORT])
    assert saved.save(session, tmp_path / "saved", bytes(32)) > 0
    session.feed(ENDLESS[SHORT:90])
    with pytest.raises(
        saved.SavedError, match=r"^29 older tokens have left this cache, by its policy; save before any"
    ):
        saved.save(session, tmp_path / "later", bytes(32))
    saved.restore(session, tmp_path / "saved", bytes(32))
    assert (session.tokens, session.left) == (ENDLESS[:SHORT], [])
    with pytest.raises(saved.SavedError, match="tokens move in the KV cache of a window"):
        saved.save(windowed(tiny, "onnx-cpu"), tmp_path / "window", bytes(32))


@pytest.mark.parametrize(("target", "most"), [("executorch-xnnpack", 2e-5), ("coreml", 5e-3)])
def test_a_ring_is_saved_until_a_slot_is_taken_again(tiny, expected, tmp_path, target, most):
    session = windowed(tiny, target)
    session.feed(TOKENS[: session.room])
    saved.save(session, tmp_path / "saved", bytes(32))
    session.feed(TOKENS[session.room : 400])
    with pytest.raises(saved.SavedError, match=rf"^{400 - session.room} older tokens have left this cache"):
        saved.save(session, tmp_path / "later", bytes(32))
    saved.restore(session, tmp_path / "saved", bytes(32))
    logits = session.feed(TOKENS[session.room : 500])
    assert np.abs(logits - expected[499]).max() <= most * np.abs(expected).max()


def test_the_eager_models_cache_loses_tokens_exactly(tiny, attended):
    weights = checkpoints.load(manifest.read(tiny("onnx-cpu", "fp32")).plan.model, None)
    model, cache = eager(weights.read, weights.architecture, "none"), None
    with torch.no_grad():
        for token, row in zip(ENDLESS, attended, strict=True):
            if cache and cache[0][0].shape[2] == SHORT:
                cache = without(cache, weights.architecture, SINK, leaving(SHORT, SINK))
            logits, cache = model(torch.tensor([[token]]), cache)
            assert np.abs(logits[0, 0].numpy() - row).max() <= 1e-5 * np.abs(attended).max()


def test_a_prompt_that_parts_before_the_window_is_fed_again(tiny, expected):
    cache = PrefixCache(windowed(tiny, "onnx-cpu"), "00" * 32)
    cache.feed([*TOKENS[:500], 3, 4, 5], lambda: False)
    assert cache.share([*TOKENS[:500], *TOKENS[500:510]]) == 500
    logits = cache.feed(TOKENS[500:510], lambda: False)
    assert np.abs(logits - expected[509]).max() <= 2e-5 * np.abs(expected).max()
    assert cache.share([*TOKENS[:100], 5]) == 0
    logits = cache.feed(TOKENS[:70], lambda: False)
    assert np.abs(logits - expected[69]).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("target", "kind"),
    [("onnx-cpu", None), ("onnx-cpu", "int8"), ("executorch-xnnpack", None), ("executorch-xnnpack", "int8")],
)
def test_prompts_that_begin_alike_give_the_logits_of_each_alone(tiny, target, kind):
    """In the same calls; the last bit of ExecuTorch's own attention differs from call to call on a busy machine."""
    exact = 0.0 if target == "onnx-cpu" else 1e-6
    folder = tiny(target, "int4-g32", kind, context_length=CONTEXT)
    session, alone = opened(folder), opened(folder)
    for prompt in (TOKENS[:700], [*TOKENS[:650], 3, 4], [*TOKENS[:520], 5]):
        alone.reset()
        np.testing.assert_allclose(session.prefill(prompt), alone.feed(prompt), rtol=exact, atol=exact)
        np.testing.assert_allclose(session.feed([7]), alone.feed([7]), rtol=exact, atol=exact)
