"""A crash, a hang, an exit or garbage of a child process is a result and never ends the parent."""

import subprocess
import sys
import time

import pytest

from export.manifest import ROOT
from runtime_tests import jobs
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import isolation
from runtime_tests.jobs.child import Child

JOB = jobs.BandwidthJob(threads=1)


@pytest.fixture
def child(monkeypatch):
    """Run this Python text instead of the worker."""

    def run(text, limit_s=30.0, **options):
        monkeypatch.setattr(isolation, "WORKER", (sys.executable, "-c", text))
        return isolation.run(JOB, limit_s=limit_s, **options)

    return run


@pytest.mark.reliability("a runtime that crashes, is killed or hangs", "an outcome in the record")
def test_a_segfault_names_its_signal(child):
    ended = child("import ctypes; ctypes.string_at(0)")
    assert (ended.outcome, ended.detail) == (Outcome.CRASH, "died by SIGSEGV")


@pytest.mark.reliability("a runtime that crashes, is killed or hangs", "an outcome in the record")
def test_an_abort_keeps_the_last_words(child):
    ended = child("import os, sys; print('kernel 7 broke', file=sys.stderr); os.abort()")
    assert (ended.outcome, ended.detail) == (Outcome.CRASH, "died by SIGABRT: kernel 7 broke")


@pytest.mark.reliability("a runtime that crashes, is killed or hangs", "an outcome in the record")
def test_a_kill_hints_at_memory(child):
    assert "out of memory" in child("import os; os.kill(os.getpid(), 9)").detail


@pytest.mark.reliability("a runtime that crashes, is killed or hangs", "an outcome in the record")
def test_a_hang_ends_with_everything_it_started(child, tmp_path):
    beat = tmp_path / "beat"
    grandchild = f"import time, pathlib\nwhile True: pathlib.Path({str(beat)!r}).touch(); time.sleep(0.02)"
    text = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); time.sleep(600)"
    ended = child(text, limit_s=3.0)
    assert ended.outcome is Outcome.TIMEOUT
    beat.unlink()
    time.sleep(0.3)
    assert not beat.exists()


REPORTING = (
    "import json, time\nfor i in range(4): print(json.dumps({'done': i, 'total': 4}), flush=True); time.sleep(0.7)"
)


@pytest.mark.parametrize(("renewed", "outcome"), [(True, Outcome.RUN_FAIL), (False, Outcome.TIMEOUT)])
def test_progress_starts_a_renewed_limit_anew(child, renewed, outcome):
    """The child reports for 2.8 s and then gives no answer."""
    assert child(REPORTING, limit_s=2.0, on_progress=lambda done, total: None, renewed=renewed).outcome is outcome


def test_a_hang_ends_a_renewed_limit_too(child):
    text = REPORTING.replace("range(4)", "range(1)") + "; time.sleep(600)"
    ended = child(text, limit_s=2.0, on_progress=lambda done, total: None, renewed=True)
    assert (ended.outcome, ended.detail) == (Outcome.TIMEOUT, "no progress within 2 s")


def test_an_exit_code_without_an_answer(child):
    ended = child("import sys; print('warning', file=sys.stderr); sys.exit(3)")
    assert (ended.outcome, ended.detail) == (Outcome.RUN_FAIL, "exit 3: warning")


@pytest.mark.parametrize("text", ["print('garbage')", "print('[1]')", "print('{\"answer\": 1}')", "pass"])
def test_an_answer_that_is_none(child, text):
    ended = child(text)
    assert ended.outcome is Outcome.RUN_FAIL
    assert "no JSON result" in ended.detail


def test_the_last_line_is_the_answer_whatever_a_library_prints_before(child):
    ended = child("print('hello from a library'); print('{\"result\": {\"x\": 1}}')")
    assert (ended.outcome, ended.result) == (Outcome.PASS, {"x": 1})


def test_progress_is_passed_on(child):
    seen = []
    text = 'import time; print(\'{"done": 1, "total": 2}\', flush=True); time.sleep(0.5); print(\'{"result": {}}\')'
    assert child(text, on_progress=lambda done, total: seen.append((done, total))).outcome is Outcome.PASS
    assert (1, 2) in seen


def test_a_child_that_never_reads_its_job(child):
    assert child("import os; os._exit(4)").detail.startswith("exit 4")


def test_the_real_worker_answers():
    ended = isolation.run(JOB, limit_s=120)
    assert ended.outcome is Outcome.PASS
    assert ended.result["bytes_per_s"] > 1e6


def test_the_real_worker_turns_an_exception_into_an_answer(tmp_path):
    job = jobs.ConformanceJob(folder=str(tmp_path), threads=1, fill=True)
    ended = isolation.run(job, limit_s=120)
    assert ended.outcome is Outcome.RUN_FAIL
    assert "manifest.json: missing" in ended.detail


def test_what_times_an_artifact_imports_no_torch():
    """Its peak memory must be that of the artifact and its runtime."""
    code = "import sys, runtime_tests.jobs.worker, runtime_tests.checks.latency; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


FIRST_THEN = """
import json, os, sys, time
for number, _ in enumerate(sys.stdin):
    if number:
        {second}
    print("words of the first", file=sys.stderr)
    print(json.dumps({{"result": {{"pid": os.getpid()}}}}), flush=True)
"""


@pytest.fixture
def standing(monkeypatch):
    """The ends of three jobs in one child, whose second job does this."""
    child = Child()

    def run(second, limit_s=30.0):
        monkeypatch.setattr(isolation, "WORKER", (sys.executable, "-c", FIRST_THEN.format(second=second)))
        return [isolation.run(JOB, limit_s=limit_s, child=child) for _ in range(3)]

    yield run
    child.close()


def test_jobs_follow_each_other_in_one_child(standing):
    ended = standing("pass")
    assert {one.outcome for one in ended} == {Outcome.PASS}
    assert len({one.result["pid"] for one in ended}) == 1


@pytest.mark.reliability("a runtime that crashes, is killed or hangs", "an outcome in the record")
@pytest.mark.parametrize(
    ("second", "outcome", "detail"),
    [
        ("os.abort()", Outcome.CRASH, "died by SIGABRT"),
        ("sys.exit(3)", Outcome.RUN_FAIL, "exit 3: no message"),
        ("time.sleep(600)", Outcome.TIMEOUT, "no answer within 2 s"),
    ],
)
def test_a_job_that_ends_its_child_leaves_the_next_another(standing, second, outcome, detail):
    first, ended, third = standing(second, limit_s=2.0)
    assert (ended.outcome, ended.detail) == (outcome, detail)
    assert (first.outcome, third.outcome) == (Outcome.PASS, Outcome.PASS)
    assert first.result["pid"] != third.result["pid"]


def test_a_failed_job_leaves_its_child_to_the_next(tmp_path):
    child, job = Child(), jobs.ConformanceJob(folder=str(tmp_path), threads=1, fill=True)
    details = [isolation.run(job, limit_s=120, child=child).detail for _ in range(2)]
    child.close()
    assert "manifest.json: missing" in details[0]
    assert details[0] == details[1]
