"""What CI is told: the exit code, the page and the JUnit file follow the newest record of each build."""

import shutil
import subprocess
import sys

import pytest
from junitparser import JUnitXml

from export import manifest
from export.build.command import run as run_app
from runtime_tests.evidence import baseline, record
from runtime_tests.evidence.record import Gate, Outcome
from runtime_tests.reports import ci
from tests.support.records import sample_record


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "build" / "tiny_int4-g32_fake")


@pytest.fixture
def report(folder, monkeypatch, tmp_path, capsys):
    """`python -m runtime_tests.reports.ci` on these records; exit code, page, JUnit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baseline, "FOLDER", tmp_path / "baselines")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def run(*records, folders=(folder,), device="host", options=()):
        for entry in records:
            record.append(of(folder, entry), baseline.RECORDS)
        monkeypatch.setattr(
            sys, "argv", ["ci_report", *map(str, [*folders, *options]), "--out", "ci", "--device", device]
        )
        code = run_app(ci.app)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, (tmp_path / "ci/summary.md").read_text(), JUnitXml.fromfile(str(tmp_path / "ci/junit.xml"))

    return run


def of(folder, entry):
    """A record of this very build."""
    return entry.model_copy(update={"manifest_sha256": manifest.digest(folder), "artifact": manifest.read(folder).id})


def gate(verdict, name="lowering: mean KL", detail=""):
    return Gate(
        name=name, value=0.5, limit=0.25, rule="at most", verdict=verdict, fails_as=Outcome.MISMATCH, detail=detail
    )


def rows(page):
    """Cells of every line of every table."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_what_holds_exits_0_and_shows_its_numbers(report):
    code, page, junit = report(sample_record())
    assert code == 0
    assert page.startswith("## Artifacts: every artifact holds\n")
    header, _, cells, *_ = rows(page)
    shown = dict(zip(header, cells, strict=False))
    total = sample_record().accuracy.total
    assert (shown["MB"], shown["decode, tok/s"], shown["TTFT, ms"]) == ("1.0", "98.5", "11")
    assert (shown["KL as shipped"], shown["verdict"]) == (f"{total.mean_kl:.3f}", "pass")
    assert (junit.tests, junit.failures, junit.errors, junit.skipped) == (1, 0, 0, 0)


def test_a_failed_gate_is_a_failure_with_value_and_limit(report):
    bad = sample_record(
        gates=(gate("fail", detail="layer 3"), gate("pass", "top-1"), gate("inconclusive", "decode", "timings vary")),
        outcome=Outcome.MISMATCH,
        detail="lowering: mean KL is 0.5, must be at most 0.25: layer | 3",
    )
    code, page, junit = report(bad)
    assert code == 1
    assert "1 of 1 artifacts failed" in page
    assert rows(page)[2][-2:] == ["**mismatch**", "lowering: mean KL is 0.5, must be at most 0.25: layer \\| 3"]
    (suite,) = junit
    cases = {case.name: case.result for case in suite}
    assert cases["lowering: mean KL"][0].message == "0.5, must be at most 0.25: layer 3"
    assert cases["top-1"] == []
    assert cases["decode"][0].message.endswith("timings vary")
    assert (junit.tests, junit.failures, junit.skipped) == (3, 1, 1)


def test_a_crash_is_an_error_even_when_every_gate_so_far_holds(report):
    crash = sample_record(outcome=Outcome.CRASH, latency=None, detail="died by SIGSEGV \x1b[31m\x00")
    code, page, junit = report(crash)
    assert (code, junit.errors, junit.failures) == (1, 1, 0)
    assert "died by SIGSEGV" in page
    assert next(iter(junit)).errors == 1


def test_noise_fails_nothing(report):
    code, _, junit = report(sample_record(gates=(gate("inconclusive"),), outcome=Outcome.INCONCLUSIVE))
    assert (code, junit.failures, junit.skipped) == (0, 0, 1)


def test_an_artifact_without_a_record_fails(report, folder):
    code, page, junit = report(folders=(folder, folder.parent / "never-built"))
    assert (code, junit.errors) == (1, 2)
    assert "no record of this build on host" in page
    assert "never-built/manifest.json: missing" in page


def test_a_build_that_failed_is_red_whatever_an_earlier_one_left(report, folder):
    assert report(sample_record())[0] == 0
    code, page, junit = report(options=("--not-built", folder))
    assert (code, junit.tests, junit.errors) == (1, 1, 1)
    assert page.startswith("## Artifacts: 1 of 1 artifacts failed\n")
    assert rows(page)[2][-2:] == ["**failed**", ci.NOT_BUILT]


def test_a_slower_run_than_the_baselines_is_shown_and_fails_nothing(report, folder):
    mine = of(folder, sample_record())
    fast = mine.latency.tests[-1].model_copy(update={"avg_ts": 1e6})
    latency = mine.latency.model_copy(update={"tests": (*mine.latency.tests[:-1], fast)})
    baseline.keep([mine.model_copy(update={"latency": latency})], "host")
    code, page, junit = report(mine)
    assert (code, junit.failures, junit.skipped) == (0, 0, 0)
    assert {row[1]: row[-1] for row in rows(page) if row[0] == mine.artifact}["decode"] == "another run: no gate"


def test_a_record_proves_nothing_of_files_that_changed_since(report, folder):
    assert report(sample_record())[0] == 0
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    code, page, junit = report()
    assert (code, junit.errors) == (1, 1)
    assert "model.safetensors: differs from manifest.json" in page


@pytest.mark.parametrize("change", [{"manifest_sha256": "cd" * 32}, {"device": "pixel-8"}])
def test_a_record_of_another_build_or_device_proves_nothing(report, folder, change):
    record.append(of(folder, sample_record()).model_copy(update=change), baseline.RECORDS)
    code, page, _ = report()
    assert code == 1
    assert "no record" in page


def test_the_newest_record_counts(report):
    assert report(sample_record(), sample_record(outcome=Outcome.MISMATCH, run_id="later"))[0] == 1
    assert report(sample_record(run_id="latest"))[0] == 0


def test_the_page_compares_with_the_baseline_and_says_where_it_cannot(report, folder):
    mine = of(folder, sample_record())
    assert "- `tiny_int4-g32_fake`: no baseline of this machine" in report(mine)[1]
    baseline.keep([mine.model_copy(update={"size_bytes": 500_000})], "host")
    compared = {row[1]: row[2:] for row in rows(report(mine)[1]) if row[0] == mine.artifact}
    assert compared["size"] == ["0.5 MB", "1 MB", "+100.0% ± 0.0%", "1.0%", "**fail**"]
    assert compared["decode"][2].startswith("+0.0% ± ")
    assert compared["decode"][-1] == "another run: no gate"
    other = mine.plan_key.model_copy(update={"recipe": "another"})
    baseline.keep([mine.model_copy(update={"plan_key": other})], "host")
    assert "is of another recipe: not compared" in report(mine)[1]


def test_github_gets_the_page_after_what_other_steps_wrote(report, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    (tmp_path / "step.md").write_text("earlier\n")
    _, page, _ = report(sample_record())
    assert (tmp_path / "step.md").read_text() == "earlier\n" + page


def test_the_report_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "runtime_tests.reports.ci", "never-built", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=manifest.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "## Artifacts: 1 of 1 artifacts failed" in done.stdout
    assert "Traceback" not in done.stderr
