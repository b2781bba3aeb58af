"""Whole validations and conversations with real tokenizers of other families, beside shapes of their own."""

import io
import sys

import pytest

from export import manifest, pipeline
from export.build.command import run
from export.checkpoints.origin import parse_origin
from export.plan import load_plan
from runtime_tests import validate
from runtime_tests.__main__ import app
from runtime_tests.evidence.record import Outcome
from tests.support.records import failed
from tests.support.tokenizers import ADDS_BOS, write_family


@pytest.mark.parametrize("family", ["llama3", "fallback"])
@pytest.mark.usefixtures("in_process")
def test_an_artifact_is_validated_and_answers_whatever_its_tokenizer(family, setting, tmp_path, monkeypatch, capsys):
    if family == "llama3":
        pytest.importorskip("llama_models", reason="llama-models (Meta's own tokenizer) is not installed")
    source, out = parse_origin(str(write_family(tmp_path / "checkpoint", family))), tmp_path / "artifact"
    monkeypatch.setattr(pipeline, "CACHE", tmp_path / "cache")
    described = pipeline.export(load_plan("llama", "int4-g32", "onnx-cpu"), source, out)
    assert described.tokenizer.adds_bos == ADDS_BOS[family]
    record = validate.validate(out, manifest.read(out), setting)
    assert (record.outcome, record.detail, failed(record)) == (Outcome.PASS, "", set())
    assert "template tokens finite: problems" in {gate.name for gate in record.gates}
    monkeypatch.setattr(sys, "argv", ["runtime_tests", "chat", str(out), "--max-new-tokens", "4"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("hello\nwörld 🙂\n".encode())))
    capsys.readouterr()
    assert run(app) == 0
    assert capsys.readouterr().err.count(" tok/s · TTFT ") == 2  # both messages were answered
