"""The release gate: whatever changed, what is worse than its limit is red, and what cannot be compared never green."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export import manifest
from export.build.command import run as run_app
from export.errors import ExportError
from runtime_tests import __main__ as cli
from runtime_tests.checks import race
from runtime_tests.evidence import gate, proof, record, release
from runtime_tests.evidence.record import Outcome
from runtime_tests.evidence.release import Side, Turn
from runtime_tests.tasks import results
from tests.support.records import sample_record

LIMITS = release.load_limits(release.LIMITS)
KL = (0.2, 0.3, 0.25, 0.24, 0.26, 0.22, 0.28, 0.25)
"""By window."""
TOP1 = (0.8, 0.7, 0.75, 0.74, 0.76, 0.72, 0.78, 0.75)


def lost(*factors):
    return tuple(kl * factors[i % len(factors)] for i, kl in enumerate(KL))


def run_of(described, *, kl=KL, top1=TOP1, windows="ab" * 32, **changes):
    """A record of an artifact with these losses by window."""
    entry = sample_record(artifact=described.id, made=proof.made(described))
    total = entry.accuracy.total.model_copy(
        update={
            "mean_kl": sum(kl) / len(kl),
            "kl_by_window": kl,
            "top1": sum(top1) / max(1, len(top1)),
            "top1_by_window": top1,
        }
    )
    accuracy = entry.accuracy.model_copy(update={"total": total, "windows": windows})
    return entry.model_copy(update={"accuracy": accuracy, **changes})


def side(described, *, tasks=None, label="side", **changes):
    return Side(label, proof.made(described), run_of(described, **changes), None, tasks)


@pytest.fixture
def described(built):
    return manifest.read(built)


def verdicts(old, new):
    return {change.name: change.verdict for change in release.compared(old, new, LIMITS)}


SAME = {"KL as shipped": "pass", "top-1 as shipped": "pass", "size": "pass"}


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({}, {}),
        ({"kl": lost(1.04)}, {}),
        ({"kl": lost(1.06)}, {"KL as shipped": "fail"}),
        ({"kl": lost(0.5)}, {}),
        ({"kl": lost(*[1.16, 0.98] * 4)}, {"KL as shipped": "inconclusive"}),  # +7 % ± 8 %
        ({"kl": lost(*[2, 0.5] * 4)}, {"KL as shipped": "inconclusive"}),
        ({"kl": lost(float("nan"))}, {"KL as shipped": "fail"}),
        ({"top1": tuple(share - 0.01 for share in TOP1)}, {}),
        ({"top1": tuple(share - 0.03 for share in TOP1)}, {"top-1 as shipped": "fail"}),
        ({"size_bytes": 1_005_000}, {}),
        ({"size_bytes": 1_011_000}, {"size": "fail"}),
    ],
)
def test_each_measure_has_its_limit(described, change, worse):
    assert verdicts(side(described), side(described, **change)) == SAME | worse


def test_recipe_checkpoint_name_and_tools_may_differ_and_are_told(described):
    """What a release changes; the baseline of one plan compares none of these."""
    plan = described.plan
    recipe = plan.quant.model_copy(update={"linear": plan.quant.linear.model_copy(update={"group_size": 64})})
    other = described.model_copy(
        update={
            "plan": plan.model_copy(update={"quant": recipe, "name": "mine"}),
            "checkpoint": described.checkpoint.model_copy(update={"origin": "local:mine", "sha256": {"a": "0" * 64}}),
            "tools": {**described.tools, "torch": "9.9"},
        }
    )
    old, new = side(described), side(other, kl=lost(1.06))
    assert verdicts(old, new)["KL as shipped"] == "fail"
    line = release.changed(old, new)
    assert "name tiny → mine" in line
    assert "checkpoint seed:20 " in line
    assert "→ local:mine " in line
    assert f"recipe {recipe.name}: linear.group_size 32 → 64" in line
    assert "→ 9.9" in line
    assert release.changed(old, old) == "nothing, the same files"
    rebuilt = replace(old, record=old.record.model_copy(update={"manifest_sha256": "cd" * 32}))
    assert release.changed(old, rebuilt) == "nothing that a manifest names"


def test_no_common_measure_is_an_error_that_says_why(described):
    with pytest.raises(ExportError, match="no common measure, validated on different windows"):
        release.compared(side(described), side(described, windows="cd" * 32), LIMITS)
    ended = side(described, detail="died by SIGSEGV")
    nothing = ended.record.accuracy.model_copy(update={"total": None})
    ended = replace(ended, record=ended.record.model_copy(update={"accuracy": nothing}))
    with pytest.raises(ExportError, match=r"ended before its loss was measured \(died by SIGSEGV\)"):
        release.compared(side(described), ended, LIMITS)


def test_the_one_before_is_of_the_same_family_and_target(described, tmp_path):
    made, artifact = proof.made(described), described.id
    mine, other = side(described), side(described, artifact="another")
    assert release.before(made, artifact, [mine], tmp_path) is mine
    assert release.before(made, "renamed", [mine], tmp_path) is mine
    assert release.before(made, artifact, [other, mine], tmp_path) is mine
    with pytest.raises(ExportError, match="has several of tiny"):
        release.before(made, "renamed", [other, mine], tmp_path)
    for change in ({"target": "coreml"}, {"family": "llama (4 layers of 8)"}):
        stranger = replace(mine, made=made.model_copy(update=change))
        with pytest.raises(ExportError, match=r"has nothing of tiny .* for fake to compare with"):
            release.before(made, artifact, [stranger], tmp_path)


def scores(value, reference=0.5, questions=100, stderr=0.002):
    score = results.Score(value, stderr, True, questions, 100)
    name = ("gsm8k", "exact_match", "none")
    newest = results.Results(None, "tiny", {}, 0.0, False, "0", {name: score}, {}, 0)
    truth = replace(score, value=reference)
    return results.Compared("tiny", newest, {name: score}, {name: truth}, frozenset(), frozenset())


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (scores(0.45), scores(0.45), "pass"),
        (scores(0.45), scores(0.42), "fail"),
        (scores(0.45), scores(0.36, reference=0.4), "pass"),  # another checkpoint, as good as its own float model
        (scores(0.45, stderr=0.05), scores(0.42, stderr=0.05), "inconclusive"),
        (scores(0.45), scores(0.42, questions=50), None),
        (scores(0.45), None, None),
    ],
)
def test_tasks_count_beyond_noise_where_both_have_them(described, old, new, verdict):
    both = verdicts(side(described, tasks=old), side(described, tasks=new))
    assert both.get("gsm8k, exact_match") == verdict


# ── speed ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAKY = (1.0, 1.3, 0.7, 1.1, 0.9, 1.2, 0.8, 1.05, 0.95)  # a machine that others use


def timed(slower, *, jitter=(1.0,), drift=SHAKY):
    """Rounds of recorded turns: the machine's mood is common to both, the jitter the new one's own."""
    count = race.ROUNDS
    moods = [drift[i % len(drift)] for i in range(count)]
    return [
        (Turn(100 * mood, 0.1 / mood), Turn(100 * mood / slower * shake, 0.1 / mood * slower / shake))
        for mood, shake in zip(moods, [jitter[i % len(jitter)] for i in range(count)], strict=True)
    ]


@pytest.mark.parametrize(
    ("slower", "jitter", "verdict"),
    [
        (1.0, (1.0,), "pass"),
        (1.0, (1.04, 0.97, 1.0), "pass"),
        (1.0, (1.0, 1.0, 1.0, 1.0, 0.4, 1.0, 1.0, 1.0, 1.0), "pass"),  # one outlier decides nothing
        (1.08, (1.0,), "pass"),
        (1.25, (1.02, 0.99, 1.0), "fail"),
        (0.5, (1.0,), "pass"),
        (1.0, (1.6, 0.6, 1.0), "inconclusive"),
    ],
)
def test_timed_in_turns_what_slows_the_machine_slows_both(slower, jitter, verdict):
    changes = release.timed(timed(slower, jitter=jitter), LIMITS.speed, "old")
    assert [(change.name, change.verdict) for change in changes] == [
        ("decode", verdict),
        ("time to first token", verdict),
    ]


def test_turns_alternate_and_go_on_until_noise_is_small():
    order = []

    def taking(name, turns):
        def turn():
            order.append(name)
            return next(turns)

        return turn

    old, new = zip(*timed(1.0), strict=True)
    race.run([taking("A", iter(old)), taking("B", iter(new))], lambda rounds: release.timed(rounds, 0.1, "old"))
    assert "".join(order) == "ABBAABBAABBAABBAAB"
    order.clear()
    old, new = zip(*(timed(1.0, jitter=(1.6, 0.6, 1.0)) * 3), strict=True)
    race.run([taking("A", iter(old)), taking("B", iter(new))], lambda rounds: release.timed(rounds, 0.1, "old"))
    assert len(order) == 2 * race.MOST_ROUNDS


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def world(built, described, monkeypatch, tmp_path, capsys, setting):
    """A release before in old/, a new artifact in new/, both validated; the gate's exit code, page and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "BUILD", tmp_path / "build")
    monkeypatch.setattr(cli, "_load_device", lambda name: setting.device)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    for name in ("old", "new"):
        shutil.copytree(built, tmp_path / name / described.id)
    rebuilt = tmp_path / "new" / described.id
    manifest.write(rebuilt, described.model_copy(update={"tools": {**described.tools, "numpy": "0"}}))
    monkeypatch.setattr(race, "turn", lambda folder, *_: world.turns[folder.parent.name])

    def run(*options, folder=rebuilt, against="old"):
        monkeypatch.setattr(
            sys, "argv", ["runtime_tests", "gate", str(folder), "--against", str(against), *map(str, options)]
        )
        code = run_app(cli.app)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, " ".join(err.split())

    def validate(name, **changes):
        folder = tmp_path / name / described.id
        entry = run_of(manifest.read(folder), manifest_sha256=manifest.digest(folder), **changes)
        record.append(entry, tmp_path / "build/records/records.jsonl")
        return entry

    run.validate, run.folder, run.turns = validate, rebuilt, dict.fromkeys(("old", "new"), Turn(100.0, 0.1))
    world.turns = run.turns
    return run


def cells(page):
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return {row[0]: row[-1] for row in ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)}


def test_a_rebuild_passes_and_says_what_changed(world, described):
    world.validate("old"), world.validate("new")
    code, page, _ = world()
    assert code == 0
    assert page.startswith("## Against the release before: nothing is worse than its limit\n")
    assert "- changed: tools numpy " in page
    shown = cells(page)
    assert {shown[name] for name in (*SAME, "decode", "time to first token")} == {"pass"}
    assert (cli.BUILD / "ci/gate.md").read_text() + "\n" == page


@pytest.mark.parametrize(
    ("changes", "turn", "worse"),
    [
        ({"kl": lost(1.051)}, Turn(100.0, 0.1), "KL as shipped"),
        ({"kl": lost(*[1.16, 0.98] * 4)}, Turn(100.0, 0.1), None),
        ({"kl": lost(*[2.2, 0.5] * 4)}, Turn(100.0, 0.1), None),
        ({}, Turn(80.0, 0.125), "decode, time to first token"),
    ],
)
def test_worse_than_its_limit_is_red(world, changes, turn, worse):
    world.validate("old"), world.validate("new", **changes)
    world.turns["new"] = turn
    code, page, _ = world()
    verdict = (
        f"**fail** ({worse})" if worse else "**open** (KL as shipped; more windows decide, as of `--eval domains`)"
    )
    assert (code, verdict in page) == (1, True)


@pytest.mark.parametrize(
    ("changes", "code", "row"),
    [
        ({}, 0, "| +0.0% ± 0.0% | 5.0% | pass |"),
        ({"kl": lost(1.051)}, 1, "| +5.1% ± 0.5% | 5.0% | **fail** |"),
        ({"kl": lost(*[1.16, 0.98] * 4)}, 1, "| +6.9% ± 8.1% | 5.0% | **inconclusive** |"),
    ],
)
@pytest.mark.parametrize("against", ["old/tiny_int4-g32_fake", "old", "release.jsonl"])
def test_one_rule_decides_whatever_the_release_before_is_given_as(world, against, changes, code, row):
    record.append(world.validate("old"), Path("release.jsonl"))
    world.validate("new", **changes)
    ended, page, _ = world(against=against)
    (line,) = [line for line in page.splitlines() if line.startswith("| KL as shipped")]
    assert (ended, line.endswith(row)) == (code, True), line


def test_a_record_without_the_windows_of_a_measure_has_no_common_one(world):
    old = world.validate("old", top1=())
    world.validate("new")
    assert old.accuracy.total.top1_by_window == ()
    code, page, _ = world()
    assert (code, "no common measure, one was validated by a version that kept no top-1" in page) == (1, True)


def test_speed_of_a_record_is_not_compared_and_neither_green_nor_red(world, tmp_path):
    before = world.validate("old")
    world.validate("new")
    record.append(before, tmp_path / "release.jsonl")
    world.turns["new"] = Turn(1.0, 10.0)
    code, page, _ = world(against="release.jsonl")
    assert (code, f"- speed not compared: {gate.RECORDED}" in page, "decode" in page) == (0, True, False)
    code, page, _ = world("--no-speed")
    assert (code, "- speed not compared: it was not asked for" in page) == (0, True)


def test_what_was_not_validated_is_red(world):
    world.validate("old")
    code, page, _ = world()
    assert (code, "**not compared**" in page) == (1, True)
    assert "no record of this build on host" in page
    world.validate("new", outcome=Outcome.MISMATCH, detail="lowering: mean KL is 9")
    code, page, _ = world()
    assert (code, "its own validation failed: mismatch: lowering: mean KL is 9" in page) == (1, True)


def test_an_artifact_that_does_not_run_is_red_and_an_evaluator_not_timed(world, monkeypatch):
    world.validate("old"), world.validate("new")

    def fail(error):
        def turn(*_):
            raise error

        monkeypatch.setattr(race, "turn", turn)
        return world()[:2]

    code, page = fail(ExportError("new: crash while it was timed: died by SIGSEGV"))
    assert (code, "died by SIGSEGV" in page) == (1, True)
    code, page = fail(race.NotTimedError("new: its session here is a reference evaluator"))
    assert (code, "- speed not compared: new: its session" in page) == (0, True)


def test_what_the_release_before_cannot_be_is_one_line(world, tmp_path, described):
    own = world.validate("new")
    empty, old_version = tmp_path / "empty", tmp_path / "version.jsonl"
    empty.mkdir()
    record.append(own.model_copy(update={"made": None}), old_version)
    (tmp_path / "text").write_text("no records\n")
    (tmp_path / "limits.yaml").write_text("kl: 5\ntop1: 0.02\nsize: 0.01\ntask: 0.02\nspeeed: 0.1\n")
    for against, line in (
        ("nowhere", "nowhere: neither an artifact folder, nor a folder of them, nor a file of records"),
        ("empty", "empty: neither an artifact folder"),
        ("text", "text: no record of an artifact on host"),
        ("version.jsonl", "version.jsonl: its record of tiny_int4-g32_fake is of an older version"),
        ("build/records/records.jsonl", "holds the new artifacts' own runs"),
        ("old", "no record of this build on host that can be compared; run `python -m runtime_tests --device host"),
    ):
        code, out, err = world(against=against)
        assert (code, out, line in err, err.count("error:")) == (1, "", True, 1), err
    code, page, _ = world(against=world.folder)
    assert (code, "is the very folder it would be compared with" in page) == (1, True)
    code, _, err = world("--limits", tmp_path / "limits.yaml")
    assert (
        code,
        "kl: Input should be less than or equal to 1; speeed: unknown key (did you mean speed?); speed: missing" in err,
    ) == (
        1,
        True,
    )
    code, _, err = world(folder=tmp_path / "nothing", against=world.folder)
    assert (code, "nothing/manifest.json: missing" in err) == (1, True)
