"""The page that helps to choose a recipe: written from records, answers asked of artifacts."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from export import manifest
from export.build.command import run
from export.plan import load_plan
from export.quantization import schemes
from runtime_tests.bench import publish
from runtime_tests.bench.studies import choosing
from runtime_tests.bench.studies.study import Study
from tests.support.benchmarks import stored_run


def test_the_committed_page_is_that_of_its_records(tmp_path, monkeypatch, capsys):
    page = (publish.DOCS / "choosing.md").read_text(encoding="utf-8")
    written = {}
    monkeypatch.setattr(publish, "write", lambda path, text: written.setdefault(path, text) and path)
    monkeypatch.setattr(sys, "argv", ["choosing"])
    assert run(choosing.app) == 0
    assert written == {publish.DOCS / "choosing.md": page}
    assert "written: docs/choosing.md" in capsys.readouterr().out


def test_perplexity_says_what_a_loss_means():
    study = Study.model_validate_json((publish.DOCS / "accuracy.json").read_bytes())
    head, first, *_, last = choosing.losses(study)
    assert head[-1] == "more than fp32"
    assert (first[0], first[-1]) == ("int4-mixed", "+4%")
    assert (last[0], last[-1]) == ("int4-g32", "+50%")


def test_sizes_are_those_of_the_shapes():
    rows = {row[0]: row[1:] for row in choosing.sizes()}
    plan = load_plan("llama32-1b-instruct", "int4-g32", "onnx-cpu")
    stored = schemes.of_recipe(plan.quant, plan.model.architecture)
    assert rows["int4-g32"][0] == f"{stored.stored_bits(float_bits=32) / 8e6:.0f}" == "811"
    # its linears, 973 M weights, take 5.6 bits each in place of 4.5
    assert float(rows["int4-g32"][0]) < float(rows["int4-mixed"][0]) < 1000


def test_only_our_artifacts_that_were_measured_have_a_row():
    measured = stored_run()
    rows = choosing.devices(measured)
    assert 1 < len(rows) <= 1 + sum(entry.ours for entry in measured.entries)


def test_an_artifact_is_asked_each_question_anew(monkeypatch, tmp_path):
    described = SimpleNamespace(plan=SimpleNamespace(quant=SimpleNamespace(name="int4-g32"), name="mine"))
    monkeypatch.setattr(manifest, "read", lambda _folder: described)
    monkeypatch.setattr(choosing, "_answer", lambda _folder, question: f"to {question}")
    answers = choosing.asked([tmp_path])
    assert answers.model == "mine"
    assert answers.answers["int4-g32"] == tuple(f"to {question}" for question in answers.questions)


def test_an_artifact_that_gives_no_answer_is_named(monkeypatch, tmp_path):
    ended = SimpleNamespace(returncode=1, stdout="", stderr="error: manifest.json: missing\n")
    monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: ended)
    with pytest.raises(choosing.ExportError, match=r"no answer: error: manifest\.json: missing"):
        choosing._answer(tmp_path, "who?")
