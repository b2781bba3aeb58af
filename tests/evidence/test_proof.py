"""An artifact that holds is skipped only while nothing that decides its verdict has changed."""

import json
from pathlib import Path

import pytest

from export import manifest
from export.plan import QuantLimits
from runtime_tests.checks import limits
from runtime_tests.evidence import baseline, proof
from runtime_tests.evidence import record as records_file
from runtime_tests.evidence.record import Outcome
from runtime_tests.places import environment
from tests.support.artifacts import renamed
from tests.support.records import sample_record


@pytest.fixture
def records(artifact, setting, tmp_path):
    """A file with one run's record of the artifact."""

    def write(**changes):
        path = tmp_path / "records.jsonl"
        key = proof.key(
            artifact,
            setting.device,
            setting.evaluation,
            environment.current(),
            limits.of(manifest.read(artifact), None),
        )
        fields = {"manifest_sha256": manifest.digest(artifact), "proof": key} | changes
        records_file.append(sample_record(**fields), path)
        return path

    return write


def unproven(artifact, setting, path):
    cases = [(artifact, manifest.read(artifact))]
    return proof.without(cases, setting.device, setting.evaluation, path)


def test_what_holds_is_left_out_and_named(artifact, setting, records, capsys):
    assert unproven(artifact, setting, records()) == []
    assert "nothing changed since" in capsys.readouterr().err


def test_what_was_never_proven_stays(artifact, setting, tmp_path):
    assert len(unproven(artifact, setting, tmp_path / "none.jsonl")) == 1


@pytest.mark.parametrize("changes", [{"outcome": Outcome.MISMATCH}, {"proof": ""}, {"proof": "0" * 64}])
def test_what_failed_or_was_proven_otherwise_stays(artifact, setting, records, changes):
    assert len(unproven(artifact, setting, records(**changes))) == 1


def test_every_input_counts(artifact, setting, monkeypatch, tmp_path):
    machine = environment.current()

    judged_by = limits.of(manifest.read(artifact), None)
    stricter = judged_by.model_copy(update={"quant": QuantLimits(max_mean_kl=0.5, min_top1=0.4)})

    def key(device=setting.device, evaluation=setting.evaluation, machine=machine, judged_by=judged_by):
        return proof.key(artifact, device, evaluation, machine, judged_by)

    before = key()
    assert key(machine=machine.model_copy(update={"load_average_1min": 99.0})) == before
    changed = {
        key(device=setting.device.model_copy(update={"max_cv": 0.5})),
        key(evaluation=setting.evaluation.model_copy(update={"prefill": 17})),
        key(machine=machine.model_copy(update={"cpu": "another"})),
        key(judged_by=stricter),
        key(machine=machine.model_copy(update={"tools": {"torch": "0"}})),
    }
    (tmp_path / "baseline.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(proof.baseline, "place", lambda name, machine: tmp_path / "baseline.json")
        changed.add(key())
    with monkeypatch.context() as patch:
        patch.setattr(proof, "CODE", (manifest.ROOT / "runtime_tests" / "checks" / "gates.py",))
        changed.add(key())
    renamed(artifact, "other")
    changed.add(key())
    assert len(changed - {before}) == 8


def test_a_file_changed_behind_the_manifests_back_is_an_error(artifact, setting, records):
    path = records()
    weights = artifact / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"model\.safetensors: .*build the artifact again"):
        unproven(artifact, setting, path)


@pytest.mark.usefixtures("in_process")
def test_the_command_proves_once(command, artifact, capsys):
    assert command("--skip-proven", artifact) == 0
    records = Path("build/records/records.jsonl")
    assert [json.loads(line)["proof"] != "" for line in records.read_text().splitlines()] == [True]
    capsys.readouterr()
    assert command("--skip-proven", artifact) == 0
    assert "nothing changed since" in capsys.readouterr().err
    assert [run.artifact for run in baseline.of_last_run("host", records)] == [manifest.read(artifact).id]
    assert command(artifact) == 0
    assert len(records.read_text().splitlines()) == 2
