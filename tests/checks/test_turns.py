"""Artifacts side by side: their jobs at once, each timed alone, and what is found is what each alone would give."""

import shutil
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from export import manifest
from export.host import interrupt
from runtime_tests import jobs, validate
from runtime_tests.checks import files
from runtime_tests.checks.subject import Shared, Turns
from runtime_tests.evidence.record import Outcome, folder_text
from runtime_tests.jobs import isolation
from tests.support.artifacts import set_fault

MEASURED = {"run_id", "started_at", "seconds", "environment", "state_before", "state_after", "latency", "folder"}


def found(record):
    """What a record says of the artifact, without what differs from run to run."""
    said = record.model_dump(exclude=MEASURED | {"gates", "proof"})
    return said | {"gates": [gate.name for gate in record.gates]}


@pytest.fixture
def pair(built, tmp_path):
    return [shutil.copytree(built, tmp_path / name) for name in "ab"]


def each(folders, setting):
    return list(validate.each([(folder, manifest.read(folder)) for folder in folders], setting))


@pytest.fixture
def watched(monkeypatch, in_process):
    """The jobs that run at the moment when each begins; both artifacts' windows are fed at once, or the test fails."""
    real, running, seen = isolation.run, [], []
    both, one_by_one = threading.Barrier(2, timeout=60), threading.Lock()

    def run(job, **options):
        running.append(job.action)
        seen.append((job.action, len(running)))
        try:
            if job.action == "logits" and [action for action, _ in seen].count("logits") <= both.parties:
                both.wait()
            with one_by_one:  # in one process they would share torch's settings
                return real(job, **options)
        finally:
            running.remove(job.action)

    monkeypatch.setattr(isolation, "run", run)
    return seen


def test_two_at_once_are_found_as_each_alone_is(pair, setting, watched, tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr(files, "_tokenizer_differences", lambda *of: looked_at.append(of) or [])
    here = replace(setting, threads=2, cache=tmp_path / "cache")
    shutil.copytree(setting.cache, here.cache, ignore=shutil.ignore_patterns("reference*"))
    together = each(pair, here)
    assert [record.folder for record in together] == [folder_text(folder) for folder in pair]
    assert [action for action, _ in watched].count("reference") == 1
    assert [(action, beside) for action, beside in watched if action == "speed"] == [("speed", 1)] * 2
    assert {action for action, _ in watched[-2:]} == {"speed"}
    assert len(looked_at) == 1
    (alone,) = each(pair[:1], replace(here, threads=1))
    assert [found(record) for record in together] == [found(alone)] * 2


def test_one_that_crashes_leaves_the_other_its_findings(pair, setting, watched):
    set_fault(pair[0], "raises")
    assert [record.outcome for record in each(pair, replace(setting, threads=2))] == [Outcome.RUN_FAIL, Outcome.PASS]


@pytest.mark.parametrize(
    ("attached", "cores", "room", "expected"),
    [
        (False, 2, 64 * 2**30, 3),
        (False, 2, 3 * 2**30, 2),
        (False, 8, 2**30, 1),
        (False, 1, 64 * 2**30, 1),
        (True, 8, 64 * 2**30, 1),
    ],
)
def test_as_many_at_once_as_cores_and_memory_allow(pair, setting, attached, cores, room, expected):
    here = replace(setting, threads=cores, place=SimpleNamespace(attached=attached))
    assert validate.abreast([manifest.read(pair[0])] * 3, here, room) == expected


def test_ctrl_c_ends_the_child_of_a_thread_that_no_signal_reaches(monkeypatch):
    monkeypatch.setattr(isolation, "WORKER", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(interrupt, "_noted", [2])
    with pytest.raises(KeyboardInterrupt):
        isolation.run(jobs.BandwidthJob(threads=1), limit_s=60)


def test_no_more_jobs_than_cores_run_at_once():
    turns, running, most = Turns(2), [], []
    full = threading.Barrier(2, timeout=60)

    def job(number):
        with turns.mine(), turns.at_work():
            running.append(number)
            full.wait()
            most.append(len(running))
            full.wait()
            running.remove(number)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [2] * 4


def test_what_is_shared_is_computed_once_even_where_it_fails():
    shared, computed = Shared(), []

    def fail():
        computed.append(1)
        raise ValueError("damaged")

    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            shared.once("key", fail)
    assert shared.once("other", lambda: 3) == shared.once("other", lambda: 4) == 3
    assert computed == [1]
