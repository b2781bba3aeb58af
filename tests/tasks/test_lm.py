"""Tasks through our sessions: the numbers and answers of lm-evaluation-harness's own HFLM on the same weights."""

import shutil

import onnx
import pytest
import torch

from export import manifest
from export.checkpoints.folder import config_json
from export.checkpoints.tokenizer import load as load_tokenizer
from export.errors import ExportError
from runtime_tests.checks.weights import checkpoint_of
from runtime_tests.sessions import greedy, open_session
from runtime_tests.tasks.lm import EagerSession

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

CONTEXT = 256
LONG = "All human beings are born free and equal in dignity and rights. " * 12
PAIRS = [
    ("The cat sat", " on the mat"),
    ("The cat sat", " on the"),
    ("The cat sat", " under it"),
    ("Grüße aus ", " Köln"),
    ("1 + 1 = ", "2"),
    ("", "Hello there"),
    ("", "<|begin|>Hello"),
    ("<|begin|>user", " says"),
    (LONG, " and so on, and on, and on"),
]
PROMPTS = [
    ("The cat sat", {"until": [], "max_gen_toks": 12}),
    ("Once", {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
    (LONG, {"until": "zzz", "max_gen_toks": 12}),
]


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def model_of(folder, session):
    from runtime_tests.tasks.lm import SessionLM

    return SessionLM(session, load_tokenizer(folder), manifest.read(folder), lambda done, total: None)


def hugging_face(folder):
    """lm-eval's HFLM over transformers' model with the weights of an artifact's checkpoint."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    described = manifest.read(folder)
    checkpoint = checkpoint_of(described, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config_json(checkpoint.architecture, torch.float32)))
    weights = {name: checkpoint.read(name) for name in checkpoint.architecture.tensor_shapes()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    model.generation_config.eos_token_id = list(described.tokenizer.eos_ids)
    return HFLM(model.eval(), tokenizer=load_tokenizer(folder), device="cpu", max_length=CONTEXT, batch_size=1)


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("onnx-cpu", "fp32")


@pytest.fixture(scope="module")
def theirs(folder):
    return hugging_face(folder)


@pytest.fixture(scope="module")
def eager(folder):
    return model_of(folder, EagerSession(manifest.read(folder), None, 2))


@pytest.fixture(scope="module")
def of_hflm(theirs):
    return theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)


def scores(model, pairs=PAIRS):
    return model.loglikelihood(requests("loglikelihood", pairs))


def answers(model, prompts=PROMPTS):
    return model.generate_until(requests("generate_until", prompts))


# ── the same as HFLM ────────────────────────────────────────────────────────────────────────────────────────────────


def test_likelihoods_are_those_of_hflm(eager, of_hflm):
    for result, expected in zip(scores(eager), of_hflm, strict=True):
        assert result[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-4)
        assert result[1] == expected[1]


@pytest.mark.parametrize(("target", "tolerance"), [("onnx-cpu", 1e-4), ("executorch-xnnpack", 1e-4), ("coreml", 5e-3)])
def test_every_format_gives_these_likelihoods(tiny, of_hflm, target, tolerance):
    folder = tiny(target, "fp32")
    model = model_of(folder, open_session(folder, manifest.read(folder), threads=2))
    for result, expected in zip(scores(model), of_hflm, strict=True):
        assert result[0] == pytest.approx(expected[0], rel=tolerance, abs=1e-3)


def test_whole_texts_are_scored_in_the_windows_of_hflm(eager, theirs):
    texts = [(LONG,), ("Hi",), ("",)]
    results = eager.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert len(eager.tok_encode(LONG)) > 2 * CONTEXT
    assert results == pytest.approx(expected, rel=1e-5)


def test_answers_are_those_of_hflm(eager, theirs):
    expected = theirs.generate_until(requests("generate_until", PROMPTS), disable_tqdm=True)
    assert answers(eager) == expected
    assert all(expected)


def test_a_tokenizer_that_adds_bos_is_used_as_hflm_does(folder, tmp_path, theirs, eager):
    from tokenizers.processors import TemplateProcessing

    with_bos = load_tokenizer(folder)
    with_bos._tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", with_bos.bos_token_id)]
    )
    texts = ["The cat", "<|begin|>The cat", ""]
    for model in (theirs, eager):
        plain, model.tokenizer = model.tokenizer, with_bos
        try:
            encoded = [model.tok_encode(text) for text in texts]
            score = model.loglikelihood(requests("loglikelihood", PAIRS[:4]), disable_tqdm=True)
        finally:
            model.tokenizer = plain
        if model is theirs:
            expected = encoded, score
    assert encoded == expected[0]
    assert encoded[0] == encoded[1]
    assert encoded[0][0] == with_bos.bos_token_id
    assert [one[0] for one in score] == pytest.approx([one[0] for one in expected[1]], rel=1e-5)
    assert score[0][0] != pytest.approx(scores(eager, PAIRS[:1])[0][0], rel=1e-3)


# ── what our sessions do ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_is_the_sessions_greedy_generation(tiny):
    folder = tiny("onnx-cpu")
    session = open_session(folder, manifest.read(folder), threads=2)
    model = model_of(folder, session)
    (text,) = answers(model, PROMPTS[:1])
    tokens = greedy(session, model.tok_encode("The cat sat"), 12)
    assert text == model.tokenizer.decode(tokens, skip_special_tokens=True)


def test_wrong_scales_give_another_score(tiny, tmp_path):
    good = tiny("onnx-cpu")
    bad = shutil.copytree(good, tmp_path / "bad")
    model = onnx.load(bad / "model.onnx")
    scale = next(one for one in model.graph.initializer if one.name.endswith("layers.1.mlp.down_proj.weight.scale"))
    values = onnx.numpy_helper.to_array(scale)
    scale.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), scale.name))
    (bad / "model.onnx.data").unlink()
    onnx.save(model, bad / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    results = [
        [score for score, _ in scores(model_of(folder, open_session(folder, manifest.read(folder), threads=2)))]
        for folder in (good, bad)
    ]
    assert max(abs(a - b) for a, b in zip(*results, strict=True)) > 0.5


def test_a_continuation_does_not_see_the_others_of_its_context(eager):
    together = scores(eager, PAIRS[:3])
    assert together == [scores(eager, [pair])[0] for pair in PAIRS[:3]]
    assert scores(eager, PAIRS[2::-1]) == together[::-1]


def test_a_session_that_does_not_rewind_gives_another_score(eager, monkeypatch):
    right = scores(eager, PAIRS[:3])
    monkeypatch.setattr(EagerSession, "rewind", lambda self, length: None)
    wrong = scores(eager, PAIRS[:3])
    assert wrong[0] == right[0]
    assert wrong[1:] != right[1:]


def test_a_context_is_fed_once_for_all_its_continuations(eager, monkeypatch):
    fed = []
    monkeypatch.setattr(
        EagerSession, "feed", lambda self, tokens, feed=EagerSession.feed: fed.append(tokens) or feed(self, tokens)
    )
    scores(eager, PAIRS[:3])
    assert len(fed) == 1


# ── edges ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pair", [("", ""), ("The cat", ""), ("", "<|begin|>")])
def test_nothing_is_certain(eager, pair):
    """The last is the token that stands for an empty context."""
    results = scores(eager, [pair, ("The cat sat", " on the mat")])
    assert results[0] == (0.0, True)
    assert results[1][0] < 0


def test_prompts_that_lose_their_beginning_are_counted(folder):
    model = model_of(folder, EagerSession(manifest.read(folder), None, 2))
    scores(model)
    answers(model)
    assert model.get_model_info() == {"truncated_requests": {"loglikelihood": 1, "generate_until": 1}}


def test_a_continuation_longer_than_the_context_is_refused(eager):
    with pytest.raises(ValueError, match=r"continuation of \d+ tokens exceeds the context of 256"):
        scores(eager, [("The", LONG)])


def test_the_first_stop_string_ends_an_answer(eager):
    (whole,) = answers(eager, [("The cat sat", {"until": [], "max_gen_toks": 12})])
    ids = eager.tok_encode(whole)
    one, two = (eager.tokenizer.decode([token]) for token in ids[4:6])
    spanning = one[-1:] + two[:1]  # the end of a token and the beginning of the next
    first = whole.index(spanning)
    assert answers(eager, [("The cat sat", {"until": [spanning], "max_gen_toks": 12})]) == [whole[:first]]
    assert answers(eager, [("The cat sat", {"until": ["never said", whole[2:4]], "max_gen_toks": 12})]) == [whole[:2]]


def test_generation_ends_with_the_stop_string_and_not_later(eager, monkeypatch):
    (whole,) = answers(eager, [("The cat sat", {"until": [], "max_gen_toks": 12})])
    steps = []
    monkeypatch.setattr(
        EagerSession, "feed", lambda self, tokens, feed=EagerSession.feed: steps.append(1) or feed(self, tokens)
    )
    answers(eager, [("The cat sat", {"until": [whole[1]], "max_gen_toks": 12})])
    assert len(steps) < 6


def test_the_end_of_sequence_ends_an_answer_and_is_no_part_of_it(eager):
    session, prompt = eager.session, eager.tok_encode("The cat sat")
    tokens = greedy(session, prompt, 12)
    stop = tokens[5]
    expected = tokens[: tokens.index(stop) + 1]
    assert greedy(session, prompt, 12, lambda made: made[-1] == stop) == expected
    ends, eager.ends = eager.ends, {stop}
    try:
        (text,) = answers(eager, [("The cat sat", {"until": [], "max_gen_toks": 12})])
    finally:
        eager.ends = ends
    assert text == eager.tokenizer.decode(expected[:-1], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"do_sample": True, "temperature": 0.7}, "ask for sampling"),
        ({"temperature": 0.7}, "ask for sampling"),
        ({"num_beams": 4}, "ask for num_beams"),
        ({"max_gen_toks": 256}, "256 new tokens leave no room"),
        ({}, "256 new tokens leave no room"),
    ],
)
def test_what_greedy_decoding_cannot_do_is_refused(eager, kwargs, words):
    with pytest.raises(ExportError, match=words):
        answers(eager, [("The cat", kwargs)])
