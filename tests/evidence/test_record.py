"""Records survive the trip to disk and back, strictly; gates judge as written."""

import resource

import pytest

from export.errors import ExportError
from export.plan import TargetLimits
from runtime_tests.checks import gates
from runtime_tests.evidence import record
from runtime_tests.evidence.record import Outcome
from tests.support.records import sample_comparison, sample_record


def test_a_record_comes_back_as_it_went(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    first, second = sample_record(), sample_record(outcome=Outcome.CRASH, latency=None, detail="died by SIGSEGV")
    record.append(first, path)
    record.append(second, path)
    assert record.newest_run(path, first.device) == [first, second]


@pytest.mark.parametrize("change", [('"size_bytes"', '"size"'), ('"schema_version":4', '"schema_version":3')])
def test_a_record_of_another_shape_is_refused_with_its_line(tmp_path, change):
    path = tmp_path / "records.jsonl"
    record.append(sample_record(run_id="20250101-000000"), path)
    record.append(sample_record(), path)
    good, newest = path.read_text().splitlines()
    path.write_text(f"{good}\n{newest.replace(*change, 1)}\n")
    with pytest.raises(ExportError, match="line 2"):
        record.newest_run(path, "host")


@pytest.mark.parametrize("field", ["commit", "manifest_sha256"])
def test_a_record_whose_commit_or_digest_is_none_is_refused(tmp_path, field):
    """The report shows `git checkout COMMIT` of it."""
    path = tmp_path / "records.jsonl"
    path.write_text(sample_record().model_copy(update={field: "HEAD\nrm -rf ."}).model_dump_json() + "\n")
    with pytest.raises(ExportError, match=f"line 1.*{field}: String should match pattern"):
        record.newest_run(path, "host")


def test_older_runs_and_other_devices_are_not_read(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"run_id": "20200101-000000", "device": "host", "of": "another version"}\n')
    record.append(sample_record(), path)
    record.append(sample_record(device="phone", run_id="20270101-000000"), path)
    path.write_text(path.read_text() + "cut off")
    assert record.newest_run(path, "host") == [sample_record()]
    assert record.newest_run(tmp_path / "none.jsonl", "host") == []


def test_gates_hold_at_their_limit_and_nan_never_does():
    assert gates.judge("kl", 0.5, "at most", 0.5, Outcome.MISMATCH).verdict == "pass"
    assert gates.judge("top1", 0.5, "at least", 0.5, Outcome.MISMATCH).verdict == "pass"
    assert gates.judge("kl", 0.51, "at most", 0.5, Outcome.MISMATCH).verdict == "fail"
    for rule in ("at most", "at least"):
        assert gates.judge("x", float("nan"), rule, 0.5, Outcome.MISMATCH).verdict == "fail"


def test_the_first_failure_names_the_outcome():
    good = gates.judge("a", 0, "at most", 0, Outcome.DAMAGED)
    weights = gates.judge("weights", 3, "at most", 0, Outcome.WEIGHTS_DIFFER, "layer 7")
    kl = gates.judge("kl", 1, "at most", 0, Outcome.MISMATCH)
    assert gates.outcome_of([good]) == (Outcome.PASS, "")
    assert gates.outcome_of([good, weights, kl]) == (Outcome.WEIGHTS_DIFFER, "weights is 3, must be at most 0: layer 7")


def judged(measured, min_decode_tps, max_ttft_s, *, max_cv, hot=""):
    timed = gates.budgets(measured, min_decode_tps=min_decode_tps, max_ttft_s=max_ttft_s)
    return gates.in_doubt(timed, measured, max_cv=max_cv, reason=hot)


def test_noise_makes_speed_undecided_and_nothing_else():
    noisy = sample_record().latency.model_copy(update={"cv": 0.5})
    decode = noisy.tests[-1].avg_ts
    near = judged(noisy, 1.2 * decode, 1.2 * noisy.ttft_p50_s, max_cv=0.1)
    assert {gate.verdict for gate in near} == {"inconclusive"}
    assert gates.outcome_of(near)[0] is Outcome.INCONCLUSIVE
    assert sample_record(outcome=Outcome.INCONCLUSIVE).holds
    far = judged(noisy, 100 * decode, 100 * noisy.ttft_p50_s, max_cv=0.1)
    assert [gate.verdict for gate in far] == ["fail", "pass"]  # no noise of this size explains that
    throttled = noisy.model_copy(update={"cv": 0.01, "first_third_ts": 100.0, "last_third_ts": 60.0})
    assert {gate.verdict for gate in judged(throttled, 1.2 * decode, 1.0, max_cv=0.1)} == {"inconclusive", "pass"}
    steady = noisy.model_copy(update={"cv": 0.01})
    assert judged(steady, 1.01 * decode, 1.0, max_cv=0.1, hot="72 °C")[0].detail == "72 °C"
    assert judged(steady, 1.01 * decode, 1.0, max_cv=0.1)[0].verdict == "fail"
    calm = judged(noisy, 1.2 * decode, 1.0, max_cv=0.9)
    assert gates.outcome_of(calm)[0] is Outcome.TOO_SLOW


def test_limits_of_a_rounding_runtime_stand_on_top_of_float_noise():
    noise = sample_comparison().model_copy(
        update={"mean_kl": 0.03, "top1": 0.87, "sqnr_db": 24.0, "positions": 520, "kl_by_window": (0.03,) * 8}
    )
    limits = TargetLimits(
        max_mean_kl=1e-3, min_top1=0.98, min_sqnr_db=25.0, min_probe_sqnr_db=None, compared_tokens=None
    )
    like_noise = noise.model_copy(update={"mean_kl": 0.0305, "kl_by_window": (0.031, 0.03) * 4})
    worse = noise.model_copy(update={"mean_kl": 0.04, "top1": 0.7, "sqnr_db": 20.0, "kl_by_window": (0.041, 0.039) * 4})
    assert {gate.verdict for gate in gates.lowering(like_noise, limits, noise)} == {"pass"}
    assert {gate.verdict for gate in gates.lowering(worse, limits, noise)} == {"fail"}
    assert {gate.verdict for gate in gates.lowering(like_noise, limits, None)} == {"fail"}


def test_one_clear_probe_is_enough_and_none_is_too_few():
    assert gates.probes([20.0, 17.0, 110.0], 60.0).verdict == "pass"
    assert gates.probes([20.0, 17.0, 41.0], 60.0).verdict == "fail"


def test_a_record_is_appended_whole_or_not_at_all(tmp_path):
    """As on a full disk, a file may not grow by more than part of a line."""
    path = tmp_path / "records.jsonl"
    record.append(sample_record(), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            record.append(sample_record(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    record.append(sample_record(), path)
    assert path.read_bytes() == 2 * before
