"""No shipped recipe calibrates on text of a shipped evaluation, and one that does is found."""

import textwrap
from dataclasses import replace

import pytest

from export import manifest
from export.errors import ExportError
from export.plan import CalibrationText, Mixture, QuantRecipe, load_named, names
from export.quantization import texts
from runtime_tests import evaluation, validate
from runtime_tests.bench import fidelity
from runtime_tests.checks import files as contamination
from runtime_tests.checks.limits import Limits
from runtime_tests.evidence.record import Outcome
from tests.support.artifacts import reseal

GPTQ = load_named(QuantRecipe, "quant", "int4-g32-gptq")


def calibrating_on(*files, name="leaky"):
    """A recipe that calibrates on these files of configs/calibration."""
    read = Mixture(
        name="leaky",
        description="ours",
        length=64,
        held_out_every=2,
        texts=tuple(CalibrationText(file=file, windows=1) for file in files),
        generated=None,
    )
    return GPTQ.model_copy(update={"name": name, "calibration": read})


@pytest.fixture
def calibration(tmp_path, monkeypatch):
    """An empty folder of calibration texts."""
    folder = tmp_path / "calibration"
    folder.mkdir()
    monkeypatch.setattr(texts, "TEXT", folder)
    return folder


def test_something_that_is_shipped_calibrates():
    assert any(load_named(QuantRecipe, "quant", name).calibration for name in names("quant"))


@pytest.mark.parametrize("eval_name", names("evals"))
@pytest.mark.parametrize("mixture", names("mixtures"))
def test_no_shipped_mixture_has_text_of_a_shipped_evaluation(mixture, eval_name):
    recipe = GPTQ.model_copy(update={"calibration": load_named(Mixture, "mixtures", mixture)})
    assert contamination.contamination(evaluation.load(eval_name), recipe) == []


FILES = sorted({spec.file for name in names("evals") for spec in evaluation.load(name).texts})


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("width", [None, 40, 200])
def test_an_evaluation_text_among_the_calibration_texts_is_refused(calibration, file, width):
    """As it is, and with other line breaks, indentation and capitals."""
    text = evaluation.read_text(file)
    wrapped = text if width is None else textwrap.indent(textwrap.fill(text.upper(), width), "\t")
    (calibration / "mine.txt").write_text("Something of our own.\n" + wrapped)
    judged = next(e for e in map(evaluation.load, names("evals")) if file in {spec.file for spec in e.texts})
    (problem,) = [line for line in contamination.contamination(judged, calibrating_on("mine.txt")) if file in line]
    assert str(calibration / "mine.txt") in problem
    assert "choose an --eval without it, or take it out of the recipe" in problem
    assert "\n" not in problem


def test_one_paragraph_is_enough_and_a_set_phrase_is_not(calibration):
    judged = evaluation.load("languages")
    paragraph = "".join(evaluation.read_text("udhr/th.txt").split())[500:700]
    (calibration / "mine.txt").write_text(paragraph[:150])
    assert len(contamination.contamination(judged, calibrating_on("mine.txt"))) == 1
    (calibration / "mine.txt").write_text(paragraph[:75])
    assert contamination.contamination(judged, calibrating_on("mine.txt")) == []


def test_a_calibration_text_that_is_gone_is_named(calibration):
    (problem,) = contamination.contamination(evaluation.load("default"), calibrating_on("gone.txt"))
    assert problem.startswith(f"{calibration / 'gone.txt'}: missing; the recipe 'leaky' calibrated on it")


def test_a_recipe_without_calibration_has_read_nothing(calibration):
    assert contamination.contamination(evaluation.load("default"), load_named(QuantRecipe, "quant", "int4-g32")) == []


@pytest.mark.parametrize("file", ["mine.txt", "gone.txt"])
def test_an_artifact_that_has_read_the_evaluation_is_not_judged_on_it(artifact, setting, in_process, calibration, file):
    (calibration / "mine.txt").write_text(evaluation.read_text("udhr/de.txt"))
    plan = manifest.read(artifact).plan.model_copy(update={"quant": calibrating_on(file)})
    reseal(artifact, plan=plan)
    given = Limits(quant=plan.quant.limits, target=plan.target.limits)
    record = validate.validate(artifact, manifest.read(artifact), replace(setting, limits=given))
    assert record.outcome is Outcome.CONTAMINATED
    assert [gate.name for gate in record.gates if gate.verdict == "fail"] == ["evaluation text read in calibration"]
    assert str(calibration / file) in record.detail
    assert record.accuracy.total is None
    assert record.latency is None


def test_the_benchmark_refuses_it_too(calibration):
    fidelity.refuse_read_text("default", ["int4-g32"])
    with pytest.raises(ExportError, match=r"prose\.txt: missing; the recipe 'int4-g32-gptq' calibrated on it"):
        fidelity.refuse_read_text("default", ["int4-g32", "int4-g32-gptq"])


def test_the_command_names_both_files_in_one_line(command, artifact, calibration, capsys):
    (calibration / "mine.txt").write_text(evaluation.read_text("udhr/de.txt"))
    plan = manifest.read(artifact).plan.model_copy(update={"quant": calibrating_on("mine.txt")})
    reseal(artifact, plan=plan)
    given = Limits(quant=plan.quant.limits, target=plan.target.limits)
    (artifact.parent / "limits.yaml").write_text(given.model_dump_json())
    assert command("--limits", artifact.parent / "limits.yaml", artifact) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "mine.txt" in line]
    assert str(evaluation.TEXT / "udhr/de.txt") in line
