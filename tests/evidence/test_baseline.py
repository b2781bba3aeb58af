"""Gates over time: a run that is larger, worse or slower than the baseline fails; noise makes it inconclusive."""

import json
import shutil
from dataclasses import replace

import pytest

from export import manifest
from export.build.command import run as run_app
from export.errors import ExportError
from runtime_tests import validate
from runtime_tests.checks import gates
from runtime_tests.evidence import baseline, proof, record, regression
from runtime_tests.evidence.record import Outcome
from tests.support.records import sample_latency, sample_record

SIZE, KL = "size against baseline, MB", "KL as shipped against baseline, nats"
DECODE, TTFT = "decode against baseline, tokens/s", "time to first token against baseline, s"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(baseline, "FOLDER", tmp_path / "baselines")
    return tmp_path / "baselines"


@pytest.fixture
def first_run(folder):
    record = sample_record()
    assert baseline.keep([record], "host")
    return record


@pytest.fixture
def before(first_run):
    return baseline.find("host", first_run.environment, first_run.artifact)


def verdicts(record, before):
    changes = regression.shipped(record.size_bytes, record.accuracy.total, before)
    changes += regression.timed(record.latency, before) if record.latency else []
    return {gate.name: gate.verdict for gate in (regression.judge(change) for change in changes)}


def timed(*, decode=1.0, ttft=1.0, spread=1.0):
    """The sample's timings with rates, times and their deviations multiplied."""
    measured = sample_latency()
    prompt, generation = measured.tests
    generation = generation.model_copy(
        update={"avg_ts": decode * generation.avg_ts, "stddev_ts": spread * generation.stddev_ts}
    )
    prompt = prompt.model_copy(update={"stddev_ns": spread * prompt.stddev_ns})
    return measured.model_copy(update={"tests": (prompt, generation), "ttft_p50_s": ttft * measured.ttft_p50_s})


def lost(record, factors):
    """A record whose windows lose more by these factors."""
    total = record.accuracy.total
    windows = tuple(factor * kl for factor, kl in zip(factors, total.kl_by_window, strict=True))
    total = total.model_copy(update={"kl_by_window": windows, "mean_kl": sum(windows) / len(windows)})
    return record.model_copy(update={"accuracy": record.accuracy.model_copy(update={"total": total})})


def test_the_same_again_passes(first_run, before):
    assert verdicts(first_run, before) == dict.fromkeys((SIZE, KL, DECODE, TTFT), "pass")


@pytest.mark.parametrize(("share", "verdict"), [(1.005, "pass"), (1.05, "fail"), (0.5, "pass")])
def test_an_artifact_that_grew_by_five_percent_fails(first_run, before, share, verdict):
    grown = first_run.model_copy(update={"size_bytes": int(share * first_run.size_bytes)})
    by_gate = verdicts(grown, before)
    assert by_gate.pop(SIZE) == verdict
    assert set(by_gate.values()) == {"pass"}


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [((2.0, 2.0), "fail"), ((1.04, 1.04), "pass"), ((0.5, 0.5), "pass"), ((1.6, 0.6), "inconclusive")],
)
def test_twice_the_kl_fails_and_windows_that_disagree_decide_nothing(first_run, before, factors, verdict):
    by_gate = verdicts(lost(first_run, factors), before)
    assert by_gate.pop(KL) == verdict
    assert set(by_gate.values()) == {"pass"}


def test_almost_nothing_may_double(first_run):
    """A float artifact loses 1e-9: three times that is no loss."""
    tiny = lost(first_run, (1e-8, 1e-8))
    assert verdicts(lost(first_run, (3e-8, 3e-8)), baseline.reached(tiny))[KL] == "pass"


@pytest.mark.parametrize(
    ("changes", "decode", "ttft"),
    [
        ({"decode": 0.95, "ttft": 1.05}, "pass", "pass"),
        ({"decode": 0.8}, "fail", "pass"),
        ({"ttft": 1.3}, "pass", "fail"),
        ({"decode": 0.8, "ttft": 1.2, "spread": 20.0}, "inconclusive", "inconclusive"),
        ({"spread": 30.0}, "inconclusive", "inconclusive"),
        ({"decode": 3.0, "ttft": 0.2, "spread": 2.0}, "pass", "pass"),
        ({"decode": 0.2, "spread": 3.0}, "fail", "inconclusive"),
    ],
)
def test_slower_beyond_noise_fails_and_noise_decides_nothing(first_run, before, changes, decode, ttft):
    by_gate = verdicts(first_run.model_copy(update={"latency": timed(**changes)}), before)
    assert (by_gate[DECODE], by_gate[TTFT]) == (decode, ttft)


def test_noise_of_the_baseline_counts_too(first_run):
    noisy = baseline.reached(first_run.model_copy(update={"latency": timed(spread=20.0)}))
    slower = first_run.model_copy(update={"latency": timed(decode=0.8)})
    assert verdicts(slower, noisy)[DECODE] == "inconclusive"


def runs_at(folder, *rates):
    """The baseline of several runs, the first at the sample's speed."""
    for number, rate in enumerate((1.0, *rates)):
        run = sample_record(run_id=f"run-{number}", latency=timed(decode=rate))
        baseline.keep([run], "host")
    return baseline.find("host", run.environment, run.artifact)


@pytest.mark.parametrize(
    ("rates", "decode", "verdict"),
    [
        ((), 0.8, "fail"),
        ((1.01, 0.99, 1.0), 0.8, "fail"),
        ((1.3, 0.75, 1.1, 0.9), 0.8, "inconclusive"),
        ((1.3, 0.75, 1.1, 0.9), 0.3, "fail"),
        ((1.3, 0.75, 1.1, 0.9), 1.7, "pass"),
    ],
)
def test_how_much_runs_differ_is_noise_too(folder, rates, decode, verdict):
    """A shared machine that is slower all day: each run is steady, and they differ."""
    before = runs_at(folder, *rates)
    assert len(before.speeds) == 1 + len(rates)
    assert verdicts(sample_record(latency=timed(decode=decode)), before)[DECODE] == verdict


def test_one_run_counts_once_and_the_oldest_go(folder):
    before = runs_at(folder, *[1.0] * (baseline.KEPT_RUNS + 3))
    assert [speed.run_id for speed in before.speeds] == [f"run-{4 + n}" for n in range(baseline.KEPT_RUNS)]
    again = sample_record(run_id=before.run_id, latency=timed(decode=1.01))
    assert len(baseline.reached(again, before).speeds) == baseline.KEPT_RUNS


def test_speeds_of_another_plan_go(first_run, before):
    other = first_run.model_copy(
        update={"run_id": "2", "plan_key": first_run.plan_key.model_copy(update={"recipe": "other"})}
    )
    assert [speed.run_id for speed in baseline.reached(other, before).speeds] == ["2"]


def test_a_run_that_only_noise_between_runs_leaves_open_is_kept(folder):
    before = runs_at(folder, 1.3, 0.75, 1.1, 0.9)
    gate = regression.judge(regression.timed(timed(decode=0.8), before)[0])
    run = sample_record(run_id="next", gates=(gate,), outcome=Outcome.INCONCLUSIVE, detail=gate.detail)
    assert gate.verdict == "inconclusive"
    assert len(baseline.reached(run, before).speeds) == 6


def test_not_a_number_fails(first_run, before):
    slow = first_run.model_copy(update={"latency": timed(decode=float("nan"))})
    assert verdicts(slow, before)[DECODE] == "fail"


def test_a_baseline_belongs_to_one_kind_of_device(first_run):
    other = first_run.environment.model_copy(update={"cpu": "another"})
    assert baseline.find("host", other, first_run.artifact) is None
    assert baseline.find("phone", first_run.environment, first_run.artifact) is None
    assert baseline.find("host", first_run.environment, "another artifact") is None


@pytest.mark.parametrize("field", ["recipe", "evaluation", "context", "model", "target"])
def test_a_baseline_of_another_plan_is_not_compared_and_says_so(first_run, before, field):
    assert baseline.not_compared(before, first_run.plan_key) == ""
    reason = baseline.not_compared(before, first_run.plan_key.model_copy(update={field: "other"}))
    assert reason == f"baseline of run {first_run.run_id} is of another {field}: not compared"


def test_the_key_follows_what_is_built_and_fed(built, setting):
    described, evaluation = manifest.read(built), setting.evaluation
    key = proof.plan_key(described, evaluation)

    def differs(**changes):
        plan = described.plan.model_copy(update={name: value for name, value in changes.items() if name != "windows"})
        fed = evaluation.model_copy(update={"texts": evaluation.texts[: changes.get("windows")]})
        return key.differs_in(proof.plan_key(described.model_copy(update={"plan": plan}), fed))

    quant = described.plan.quant
    assert differs() == []
    limits = quant.limits.model_copy(update={"max_mean_kl": 9.0})
    assert differs(quant=quant.model_copy(update={"description": "in other words", "limits": limits})) == []
    linear = quant.linear.model_copy(update={"group_size": 64})
    assert differs(quant=quant.model_copy(update={"linear": linear})) == ["recipe"]
    assert differs(windows=1) == ["evaluation"]
    assert differs(model=described.plan.model.model_copy(update={"source": "seed:9"})) == ["model"]


def test_only_what_holds_becomes_a_baseline(folder, before, first_run):
    (folder / next(folder.iterdir())).unlink()
    assert baseline.keep([sample_record(outcome=Outcome.MISMATCH)], "host") == []
    assert baseline.keep([with_failed(first_run, grown_gate(before), outcome=Outcome.CRASH)], "host") == []
    other = gates.judge("lowering: mean KL", 1.0, "at most", 0.5, Outcome.MISMATCH)
    assert baseline.keep([with_failed(first_run, grown_gate(before), other, outcome=Outcome.TOO_LARGE)], "host") == []
    assert list(folder.iterdir()) == []


def test_what_only_the_baseline_refuses_is_accepted_by_keeping_it(first_run, before):
    grown = with_failed(first_run, grown_gate(before), outcome=Outcome.TOO_LARGE)
    grown = grown.model_copy(update={"size_bytes": 2 * first_run.size_bytes})
    assert verdicts(grown, before)[SIZE] == "fail"
    assert baseline.keep([grown], "host")
    accepted = baseline.find("host", first_run.environment, first_run.artifact)
    assert (verdicts(grown, accepted)[SIZE], accepted.speeds) == ("pass", before.speeds)


def grown_gate(before):
    """The gate of an artifact twice as large."""
    return regression.judge(regression.shipped(2 * before.size_bytes, sample_record().accuracy.total, before)[0])


def with_failed(record, *failed, outcome):
    return record.model_copy(update={"gates": failed, "outcome": outcome})


NOISY = gates.judge(
    "budget: decode rate", 9.0, "at least", 9.5, Outcome.TOO_SLOW, "timings vary by 39%, more than 15%"
).model_copy(update={"verdict": "inconclusive"})


@pytest.mark.parametrize("change", [{"emulated": True}, {"gates": (NOISY,)}, {"latency": None}])
def test_speed_is_kept_only_where_it_was_judged(folder, change):
    record = sample_record(**change)
    assert baseline.keep([record], "host")
    stored = baseline.find("host", record.environment, record.artifact)
    assert (stored.speeds, stored.size_bytes) == ((), record.size_bytes)
    assert set(verdicts(sample_record(), stored)) == {SIZE, KL}


def test_the_command_keeps_what_another_machine_recorded(folder, tmp_path, monkeypatch, capsys):
    """Records of a CI machine, downloaded, become the baseline of that machine."""
    there = sample_record().environment.model_copy(update={"cpu": "of the CI"})
    record.append(sample_record(environment=there), tmp_path / "records.jsonl")
    arguments = ["baseline", "host", "--records", str(tmp_path / "records.jsonl")]
    monkeypatch.setattr("sys.argv", arguments)
    assert run_app(baseline.app) == 0
    assert "tiny_int4-g32_fake" in capsys.readouterr().out
    assert baseline.find("host", there, "tiny_int4-g32_fake").speeds
    assert baseline.find("host", sample_record().environment, "tiny_int4-g32_fake") is None
    monkeypatch.setattr("sys.argv", [*arguments, "--no-speed"])
    assert run_app(baseline.app) == 0
    assert "without speed: not timed" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "empty.jsonl").touch()
    for words, code, line in (
        (("host", "--records", tmp_path / "empty.jsonl"), 1, "no record of host that holds"),
        (("host", "--records", tmp_path / "none.jsonl"), 2, "none.jsonl' does not exist"),
        (("hsot",), 1, "error: unknown device 'hsot'; did you mean host?"),
    ):
        monkeypatch.setattr("sys.argv", ["baseline", *map(str, words)])
        assert run_app(baseline.app) == code
        assert line in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def keeping(folder, tmp_path, monkeypatch, capsys):
    """`make baseline` in a folder of its own: exit code, lines, error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["baseline", "host", *map(str, arguments)])
        code = run_app(baseline.app)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), " ".join(err.split())

    return run


def built_as(name, built, tmp_path, tools):
    """A build of the artifact, and its record."""
    made = shutil.copytree(built, tmp_path / name)
    described = manifest.read(made)
    manifest.write(made, described.model_copy(update={"tools": {**described.tools, "numpy": tools}}))
    sha256 = manifest.digest(made)
    entry = sample_record(artifact=described.id, manifest_sha256=sha256, run_id=f"run-{tools}", folder=name)
    record.append(entry, baseline.RECORDS)
    return made


def test_the_last_run_is_what_was_asked_for_proven_before_or_not(keeping, built, tmp_path):
    mine, other = (built_as(name, built, tmp_path, name) for name in ("mine", "other"))
    baseline.remember("host", [mine], baseline.RECORDS)
    code, lines, _ = keeping()
    assert code == 0
    assert [line.split(": ")[1] for line in lines] == ["tiny_int4-g32_fake, run run-mine"]
    code, lines, _ = keeping(other)
    assert [line.split(": ")[1] for line in lines] == ["tiny_int4-g32_fake, run run-other"]


def test_what_the_baseline_cannot_decide_is_asked(keeping, built, tmp_path):
    assert "no record of host's last run; run `make host` first, or give the artifacts' folders" in keeping()[2]
    mine, other = (built_as(name, built, tmp_path, name) for name in ("mine", "other"))
    baseline.remember("host", [mine, other], baseline.RECORDS)
    asked = 'two builds, mine and other; which is the baseline? Give its folder (`make baseline ARTIFACTS="other"`)'
    for arguments in ((), ("--records", baseline.RECORDS)):
        code, lines, err = keeping(*arguments)
        assert (code, lines, asked in err) == (1, [], True)
    assert f"{tmp_path}/third/manifest.json: missing" in keeping(tmp_path / "third")[2]


def test_what_does_not_hold_is_named_and_left_out(keeping, built, tmp_path):
    mine = built_as("mine", built, tmp_path, "mine")
    record.append(
        sample_record(
            artifact="x", manifest_sha256=manifest.digest(mine), outcome=Outcome.CRASH, detail="died", latency=None
        ),
        baseline.RECORDS,
    )
    baseline.remember("host", [mine], baseline.RECORDS)
    code, lines, _ = keeping()
    assert (code, lines) == (1, ["left out: x, crash in run 20260101-000000: died"])


def test_a_damaged_baseline_is_named(first_run):
    path = baseline.place("host", first_run.environment)
    path.write_text(json.dumps({"device": "host"}))
    with pytest.raises(ExportError, match=path.name):
        baseline.find("host", first_run.environment, first_run.artifact)


@pytest.fixture
def validated(folder, artifact, setting, in_process):
    """Validates the artifact and gives its record."""
    return lambda to=setting: validate.validate(artifact, manifest.read(artifact), to)


def test_validation_compares_with_the_baseline(validated, monkeypatch):
    first = validated()
    assert not any("baseline" in gate.name for gate in first.gates)
    baseline.keep([first], "host")
    again = {gate.name: gate.verdict for gate in validated().gates if "baseline" in gate.name}
    assert again == {SIZE: "pass", KL: "pass"}  # and no speed: that was another run
    smaller = first.model_copy(update={"size_bytes": int(first.size_bytes / 1.05)})
    baseline.keep([smaller], "host")
    grown = validated()
    assert (grown.outcome, grown.detail.startswith(SIZE)) == (Outcome.TOO_LARGE, True)
    total = lost(first, [0.5] * 3)
    baseline.keep([total], "host")
    worse = validated()
    assert (worse.outcome, worse.detail.startswith(KL)) == (Outcome.MISMATCH, True)


def test_validation_says_what_it_does_not_compare(validated, setting, capfd):
    baseline.keep([validated()], "host")
    shorter = setting.evaluation.model_copy(update={"texts": setting.evaluation.texts[:1]})
    record = validated(replace(setting, evaluation=shorter))
    assert not any("baseline" in gate.name for gate in record.gates)
    assert "is of another evaluation: not compared; `make baseline` keeps this run" in capfd.readouterr().err
