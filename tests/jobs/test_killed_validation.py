"""A validation that is killed, and two at once: whole records, and neither processes nor logits left behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from export import manifest
from export.formats import admission
from export.host import disk
from runtime_tests.places import scratch
from tests.support.processes import one_error, results

VALIDATION = """
import sys; from pathlib import Path; from export.build.command import run; from runtime_tests import __main__ as cli
cli.CACHE = Path("build/cache").absolute(); sys.exit(run(cli.app))
"""


def started(folder, place):
    """`python -m runtime_tests` on an artifact, in a folder and with a cache of its own."""
    command = [sys.executable, "-c", VALIDATION, "--eval", "emulated", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(manifest.ROOT)}
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def killed_after(folder, place, stage):
    """Kill a validation after a stage has ended, that is, within the next one."""
    with started(folder, place) as process:
        for line in process.stderr:
            if line.strip().startswith(stage):
                break
        time.sleep(0.5)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert psutil.wait_procs(children, timeout=20)[1] == []
    return len(children)


def outcomes(place):
    path = place / "build/records/records.jsonl"
    return [json.loads(line)["outcome"] for line in path.read_text().splitlines()] if path.exists() else []


def order(folder, place, **accident):
    """One validation for `fakes/command.py`."""
    return {"folder": str(folder), "place": str(place), "look": [str(place / "build")], **accident}


STAGES = (
    "memory", "files", "text", "tokenizer", "weights", "references", "compare", "artifact", "cache", "speed", "report"
)  # fmt: skip


@pytest.mark.reliability("SIGKILL at every stage of a validation, then the same again", "whole, as if nothing had been")
def test_a_validation_killed_at_any_stage_is_whole_the_next_time(tiny, tmp_path, record_property):
    """Every stage, and the moment when the record is written but not yet in the card."""
    folder = tiny("onnx-cpu")
    (tmp_path / "build").mkdir()
    moments = [{"at": stage} for stage in STAGES] + [{"after": "runtime_tests.evidence.record:append"}]
    orders = [order(folder, tmp_path, **moment, accident="SIGKILL", alone=True) for moment in moments]
    assert [result["code"] for result in results(*orders)] == [-signal.SIGKILL] * len(orders)
    admission.require(folder, manifest.read(folder))
    for path in (tmp_path / "build" / "cache").glob("*.npy"):
        assert np.isfinite(np.load(path, mmap_mode="r")).all()
    written = len(outcomes(tmp_path))
    assert written == 2  # those whose record was written
    let_go(tmp_path)
    (last,) = results(order(folder, tmp_path, at="nowhere"))
    assert last["code"] == 0, last
    assert outcomes(tmp_path)[written:] in (["pass"], ["inconclusive"])
    assert rooms(tmp_path) == []
    record_property("cases", len(orders))


@pytest.mark.reliability("SIGKILL of a validation while its child works", "no process and no logits left")
def test_a_killed_validation_takes_its_child_with_it(tiny, tmp_path):
    folder = tiny("onnx-cpu")
    (tmp_path / "build").mkdir()
    assert killed_after(folder, tmp_path, "weights") > 0
    assert outcomes(tmp_path) == []
    assert let_go(tmp_path)
    scratch.sweep(tmp_path / "build")
    assert rooms(tmp_path) == []


def rooms(place):
    return list((place / "build").glob(f"{scratch.PREFIX}*"))


def let_go(place):
    """Make what killed validations left old enough to be removed."""
    for room in (left := rooms(place)):
        os.utime(room, (0, 0))
    return left


@pytest.mark.reliability("a disk that fills up during a validation", "one line, no half record")
def test_a_disk_that_fills_up_is_named_and_says_nothing_of_the_artifact(small_disk, tiny, tmp_path, record_property):
    place, folder = tmp_path / "disk", tiny("onnx-cpu")
    moments = [
        ({"at": "tokenizer"}, 0),
        ({"at": "references"}, 200_000),
        ({"at": "artifact"}, 200_000),
        ({"at": "speed"}, 0),
        ({"after": "runtime_tests.evidence.record:append"}, 0),
        ({"at": "report"}, 0),
    ]
    common = {"accident": "fill", "disk": str(place)}
    orders = [order(folder, place, **moment, **common, leave=leave) for moment, leave in moments]
    for accident, result in zip(orders, small_disk(place, orders, "size=1200m"), strict=True):
        assert "the disk is full (" in one_error(result["stderr"]), accident
        (left,) = result["left"].values()
        assert (result["code"], [name for name in left if name.startswith(scratch.PREFIX)]) == (1, []), accident
    record_property("cases", len(orders))


@pytest.mark.reliability("two validations of one artifact at once", "both whole")
def test_two_validations_of_one_artifact_at_once(tiny, tmp_path):
    folder = tiny("onnx-cpu")
    (tmp_path / "build").mkdir()
    with started(folder, tmp_path) as first, started(folder, tmp_path) as second:
        for process in (first, second):
            process.communicate(timeout=400)
    assert len(outcomes(tmp_path)) == 2
    assert set(outcomes(tmp_path)) <= {"pass", "inconclusive"}
    admission.require(folder, manifest.read(folder))


def test_without_locks_nothing_is_removed(monkeypatch, tmp_path):
    """On such a file system nobody can tell whether the run that left a folder is alive."""

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with scratch.folder(tmp_path) as running:
        os.utime(running, (0, 0))
        scratch.sweep(tmp_path)
        assert running.is_dir()
    assert rooms(tmp_path.parent) == []


def test_a_running_ones_folder_stays_and_a_fresh_one_too(tmp_path):
    held, fresh, old = (tmp_path / f"{scratch.PREFIX}{name}" for name in ("held", "fresh", "old"))
    for room in (held, fresh, old):
        room.mkdir()
    with disk.locked(held / "run"):
        for room in (held, old):
            os.utime(room, (0, 0))
        scratch.sweep(tmp_path)
    assert [room.exists() for room in (held, fresh, old)] == [True, True, False]
