"""A validation that is killed, and two at once: whole records, no process left, no logits left behind."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from export import disk, manifest
from runtime_tests import scratch


def started(folder, place):
    """`python -m runtime_tests` on an artifact, in a folder of its own."""
    command = [sys.executable, "-m", "runtime_tests", "--eval", "emulated", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(manifest.ROOT)}
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def killed_after(folder, place, stage):
    """Killed as soon as a stage has ended, so within the next one."""
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


@pytest.mark.reliability("SIGKILL at stages of a validation, then the same validation again", "whole, nothing left")
def test_a_killed_validation_leaves_nothing_and_the_next_one_is_whole(tiny, tmp_path, record_property):
    folder = tiny("onnx-cpu")
    (tmp_path / "build").mkdir()
    stages = ("tokenizer", "artifact")
    assert sum(killed_after(folder, tmp_path, stage) for stage in stages) > 0
    assert outcomes(tmp_path) == []
    record_property("cases", len(stages))
    rooms = list((tmp_path / "build").glob(f"{scratch.PREFIX}*"))
    assert rooms
    for room in rooms:
        os.utime(room, (0, 0))
    with started(folder, tmp_path) as process:
        process.communicate(timeout=300)
    assert outcomes(tmp_path) in (["pass"], ["inconclusive"])
    assert list((tmp_path / "build").glob(f"{scratch.PREFIX}*")) == []


@pytest.mark.reliability("two validations of one artifact at once", "both whole")
def test_two_validations_of_one_artifact_at_once(tiny, tmp_path):
    folder = tiny("onnx-cpu")
    (tmp_path / "build").mkdir()
    with started(folder, tmp_path) as one, started(folder, tmp_path) as other:
        for process in (one, other):
            process.communicate(timeout=400)
    assert len(outcomes(tmp_path)) == 2
    assert set(outcomes(tmp_path)) <= {"pass", "inconclusive"}
    manifest.verify_files(folder, manifest.read(folder))


def test_a_running_ones_folder_stays_and_a_fresh_one_too(tmp_path):
    held, fresh, old = (tmp_path / f"{scratch.PREFIX}{name}" for name in ("held", "fresh", "old"))
    for room in (held, fresh, old):
        room.mkdir()
    with disk.locked(held / "run"):
        for room in (held, old):
            os.utime(room, (0, 0))
        scratch.sweep(tmp_path)
    assert [room.exists() for room in (held, fresh, old)] == [True, True, False]
