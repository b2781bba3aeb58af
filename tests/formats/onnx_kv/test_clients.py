"""Stock clients on an ONNX artifact: onnxruntime-genai and lm-evaluation-harness."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from export import manifest
from export.checkpoints.tokenizer import load as load_tokenizer
from tests.support.metrics import random_tokens
from tests.support.onnx import PREFILL, genai_greedy, greedy, session_of
from tests.support.reliability import NUMBERS


@pytest.fixture(scope="session")
def lm_eval_model(all_logits):
    from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM

    return ONNXRuntimeGenAILM(str(all_logits), max_gen_toks=12)


def test_onnxruntime_genai_generates_what_our_session_does(untied, tmp_path):
    """Greedy, up to the end-of-sequence id of genai_config.json, here one that our session generates."""
    prompt = random_tokens(30, vocab=250)
    ours = greedy(session_of(untied), prompt, 32)
    assert len(set(ours)) > 8, "a model that repeats itself proves nothing"
    folder = shutil.copytree(untied, tmp_path / "copy")
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["eos_token_id"] == list(manifest.read(untied).tokenizer.eos_ids)
    config["model"]["eos_token_id"] = [ours[20]]
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert genai_greedy(folder, prompt, 62) == ours[: ours.index(ours[20])]


@NUMBERS
@pytest.mark.parametrize("options", [{"batch_size": 2}, {"num_beams": 3}])
def test_onnxruntime_genai_refuses_a_batch(untied, options):
    """It marks no padding that stands before a shorter prompt, so the graph cannot tell it from tokens."""
    import onnxruntime_genai as og

    model = og.Model(str(untied))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=12, do_sample=False, **options)
    generator = og.Generator(model, parameters)
    prompts = np.array([[5, 6, 7]] * options.get("batch_size", 1), np.int32)
    with pytest.raises(Exception, match=r"input_ids for the following indices\s+index: 0 Got: [23] Expected: 1"):
        generator.append_tokens(prompts)


@NUMBERS
@pytest.mark.parametrize("mask", [[0, 1, 1], [1, 1, 0], [1, 0, 1], [1, 1, 1]])
def test_padding_in_the_mask_is_refused_by_name(untied, mask):
    session = session_of(untied).runtime
    empty = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in session.get_inputs()[2:]
    }
    feeds = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.array([mask]), **empty}
    if all(mask):
        assert np.isfinite(session.run(["logits"], feeds)[0]).all()
        return
    with pytest.raises(Exception, match="attention_mask_must_not_have_padding"):
        session.run(["logits"], feeds)


def test_stock_clients_get_threads_that_sleep(artifact):
    config = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    options = config["model"]["decoder"]["session_options"]
    assert 0 < int(options["session.intra_op.spin_duration_us"]) < 1000
    assert options["intra_op_num_threads"] == 0


def test_onnxruntime_genai_reads_the_tokenizer_files(artifact):
    import onnxruntime_genai as og

    theirs, ours, text = og.Tokenizer(og.Model(str(artifact))), load_tokenizer(artifact), "Grüße aus Köln, 1 + 1 = 2"
    assert theirs.encode(text).tolist() == ours.encode(text)
    assert theirs.decode(theirs.encode(text)) == text


def test_logits_of_every_position_end_in_those_of_the_last(untied, all_logits):
    """Only the outputs are different; shorter products may round differently in the last bit."""
    ids = random_tokens(PREFILL)
    last, every = (session_of(folder).feed(ids) for folder in (untied, all_logits))
    np.testing.assert_allclose(last, every, atol=1e-4)
    for folder, positions in ((untied, 1), (all_logits, PREFILL)):
        assert generate_prompt_logits(folder, ids).shape[1] == positions


def generate_prompt_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits of onnxruntime-genai after a prompt."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=PREFILL + 1)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    return generator.get_output("logits")


def test_lm_evaluation_harness_scores_as_our_session_does(untied, lm_eval_model):
    from lm_eval.api.instance import Instance

    pairs = [("The cat sat", " on the mat"), ("Grüße aus", " Köln"), ("1 + 1 =", " 2")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scores = lm_eval_model.loglikelihood(requests, disable_tqdm=True)
    session, tokenizer = session_of(untied), load_tokenizer(untied)
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        session.reset()
        logits, total = session.feed(tokenizer.encode(context)), 0.0
        for token in tokenizer.encode(continuation):
            total += float(torch.tensor(logits).double().log_softmax(-1)[token])
            logits = session.feed([token])
        assert score == pytest.approx(total, rel=0.01)


def test_lm_evaluation_harness_generates_what_our_session_does(untied, lm_eval_model):
    from lm_eval.api.instance import Instance

    tokenizer = load_tokenizer(untied)
    request = Instance("generate_until", {}, ("The cat sat", {"until": [], "max_gen_toks": 12}), 0)
    text = lm_eval_model.generate_until([request], disable_tqdm=True)[0]
    ours = greedy(session_of(untied), tokenizer.encode("The cat sat"), 12)
    assert text == tokenizer.decode(ours, skip_special_tokens=True)
