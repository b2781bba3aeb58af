"""Where calibration text comes from: files and the model itself; what each refuses."""

import pytest
import torch

from export import checkpoints, quantization
from export.architecture import EMBEDDING, HEAD
from export.errors import ExportError
from export.model import Llama
from export.plan import CalibrationText, GeneratedText, Mixture, QuantRecipe, load_named, load_plan, names
from export.quantization import calibration, texts
from export.quantization.store import Unfinished

WRITTEN = Mixture(
    name="test",
    description="what the model says",
    length=24,
    held_out_every=2,
    texts=(CalibrationText(file="prose.txt", windows=2),),
    generated=GeneratedText(prompts="prompts.txt", windows=3),
)


@pytest.fixture(scope="module")
def opened():
    return checkpoints.load(load_plan("tiny", "int4-g32", "onnx-cpu").model, None)


@pytest.fixture(scope="module")
def model(opened):
    weights = {name: opened.read(name) for name in opened.architecture.tensor_shapes()}
    return Llama(opened.architecture).load({**weights, HEAD: weights[EMBEDDING]})


def test_every_row_begins_with_its_prompt_and_goes_on_in_the_models_words(model):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ids = texts.conversations(model, prompts, frozenset(), 2, 20)
    assert ids.shape == (2, 20)
    assert ids[0, :3].tolist() == prompts[0]
    assert ids[1, :5].tolist() == prompts[1]
    assert torch.equal(ids, texts.conversations(model, prompts, frozenset(), 2, 20))
    alone = texts.conversations(model, [prompts[0]], frozenset(), 1, 20)
    assert not torch.equal(alone[0], ids[0])  # the draws are shared by the rows


def test_what_is_drawn_follows_the_models_distribution(model):
    """Of many rows with one prompt, the tokens after it are spread as the model says."""
    prompt = [5, 6, 7]
    ids = texts.conversations(model, [prompt], frozenset(), 3000, 4)[:, 3]
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0][0, -1].softmax(-1)
    drawn = torch.bincount(ids, minlength=len(expected)) / len(ids)
    assert float((drawn - expected).abs().sum()) < 0.45  # a uniform guess is off by more than 0.6
    uniform = torch.full_like(expected, 1 / len(expected))
    assert float((uniform - expected).abs().sum()) > 0.6


def test_a_finished_answer_is_followed_by_the_next_prompt(model):
    ends = frozenset(range(512))
    ids = texts.conversations(model, [[5, 6], [7, 8], [9, 10]], ends, 2, 9)
    assert [ids[0, i : i + 2].tolist() for i in (0, 3, 6)] == [[5, 6], [9, 10], [7, 8]]
    assert [ids[1, i : i + 2].tolist() for i in (0, 3)] == [[7, 8], [5, 6]]


def test_generated_windows_are_kept_by_an_interrupted_run(opened, tmp_path, monkeypatch):
    unfinished = Unfinished(tmp_path / "unfinished")
    first = calibration.tokens(opened, WRITTEN, unfinished, "cpu")
    assert first.shape == (5, 24)
    monkeypatch.setattr(texts, "conversations", lambda *_: pytest.fail("written again"))
    assert torch.equal(calibration.tokens(opened, WRITTEN, unfinished, "cpu"), first)


def test_a_tokenizer_without_a_chat_template_cannot_generate(opened, tmp_path):
    class Plain:
        chat_template = None

    with pytest.raises(ExportError, match=r"seed:20: no chat template, .*use another mixture"):
        texts.prompt_ids(["Hello"], Plain(), opened.origin)


def test_prompts_are_part_of_what_decides_the_integers(opened, tmp_path, monkeypatch):
    plan = load_plan("tiny", "int4-g32-gptq", "onnx-cpu").quant
    recipe = plan.model_copy(update={"calibration": WRITTEN})
    before = quantization.content_key(opened, recipe, None)
    (tmp_path / "prompts.txt").write_text("Another question?\n")
    (tmp_path / "prose.txt").write_text(texts.read("prose.txt"))
    monkeypatch.setattr(texts, "TEXT", tmp_path)
    assert quantization.content_key(opened, recipe, None) != before
    assert set(texts.sha256(WRITTEN)) == {"prose.txt", "prompts.txt"}


def test_a_recipe_that_names_no_mixture_is_told_the_known_ones():
    fields = load_named(QuantRecipe, "quant", "int4-g32-gptq").model_dump()
    with pytest.raises(ExportError, match=r"unknown name .nothing. in configs/mixtures; known: .*diverse"):
        QuantRecipe.model_validate({**fields, "calibration": "nothing"})


def test_a_mixture_with_nothing_to_hold_out_is_refused(opened):
    few = WRITTEN.model_copy(update={"held_out_every": 9, "generated": None})
    with pytest.raises(ExportError, match=r"a mixture of 2 windows has none to hold out \(each 9th\)"):
        calibration.split(torch.zeros(2, 24), few.held_out_every)


@pytest.mark.parametrize("name", names("mixtures"))
def test_every_text_of_every_mixture_is_there(name):
    mixture = load_named(Mixture, "mixtures", name)
    assert all(len(digest) == 64 for digest in texts.sha256(mixture).values())
    assert mixture.windows >= mixture.held_out_every
