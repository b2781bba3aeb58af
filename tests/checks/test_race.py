"""One turn of the release gate's timing: a process of its own, the medians of its repeats."""

import pytest

from export.errors import ExportError
from runtime_tests.checks import race

pytestmark = pytest.mark.usefixtures("in_process")


def test_a_turn_is_the_medians_of_its_repeats(artifact, setting, monkeypatch):
    raw = {"measured": True, "prompts": {8: [3e9, 1e9, 2e9]}, "decode": [[1e9] * 4, [5e8] * 4, [2e9] * 4]}
    monkeypatch.setattr("runtime_tests.checks.latency.measure", lambda job: raw)
    assert race.turn(artifact, setting.place, setting.evaluation.speed, 60) == race.Turn(decode_ts=1.0, ttft_s=2.0)


def test_a_real_turn_runs_the_artifact(artifact, setting):
    turn = race.turn(artifact, setting.place, setting.evaluation.speed, 60)
    assert min(turn) > 0


@pytest.mark.parametrize(
    ("fault", "error", "line"),
    [
        ("reference evaluator", race.NotTimedError, "its session here is a reference evaluator"),
        ("does not load", ExportError, "while it was timed: .*the file is of a newer version"),
    ],
)
def test_what_is_not_timed_says_why(artifact, setting, fault, error, line):
    (artifact / "model.fault").write_text(fault)
    with pytest.raises(error, match=line):
        race.turn(artifact, setting.place, setting.evaluation.speed, 60)
