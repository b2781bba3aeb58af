"""Several targets of one plan, built side by side by real processes of the tiny model."""

import inspect
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from export import manifest, quantization
from export.build import parallel
from export.build.needs import Estimate
from tests.support.processes import left_running

TARGETS = ("coreml", "executorch-xnnpack", "onnx-cpu")
FOLDERS = [f"tiny_int4-g32_{target}" for target in TARGETS]


SLOWLY = """

def slowly(function):
    def wait_and_call(*arguments):
        import time

        print("quantizing", flush=True)
        time.sleep(3)
        function(*arguments)

    return wait_and_call


{name} = slowly({name})
"""


@pytest.fixture
def project(tmp_path):
    """A checkout of its own, with a cache and a build folder of its own; it says when it quantizes, slowly."""
    for name in ("export", "configs"):
        shutil.copytree(manifest.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(manifest.ROOT / "llama_on_device.py", tmp_path)
    code = tmp_path / Path(inspect.getfile(quantization)).relative_to(manifest.ROOT)
    with code.open("a") as file:
        file.write(SLOWLY.format(name=quantization.write_store.__name__))
    return tmp_path


def started(project, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "export", "tiny", "int4-g32", *words],
        cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def built(project):
    """Everything in the build folder but locks and the cache."""
    there = sorted(path.name for path in (project / "build").iterdir())
    return [name for name in there if not name.endswith(".lock") and name != "cache"]


def errors(stderr):
    assert "Traceback" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("error:")]


def test_all_targets_of_a_plan_quantize_once_and_are_what_each_alone_is(project):
    with started(project, *TARGETS) as process:
        said, told = process.communicate(timeout=300)
    assert (process.returncode, errors(told)) == (0, []), told
    assert built(project) == FOLDERS
    assert said.splitlines().count("quantizing") == 1
    assert len(list((project / "build" / "cache").glob("quantized-*.safetensors"))) == 1
    for folder in FOLDERS:
        assert f"build/{folder}: model" in said
    with started(project, TARGETS[2], "--out", "alone") as process:
        process.communicate(timeout=300)
    assert manifest.read(project / "alone").files == manifest.read(project / "build" / FOLDERS[2]).files
    first, second, *lines = told.splitlines()
    assert first == "tiny_int4-g32"
    assert second.strip().startswith("3 targets need ")
    for line in lines:  # each line is one child's, whole
        name, bar, rest = line.partition("|")
        assert (name.strip() in TARGETS, bar) == (True, "|"), line
        assert not any(other in rest and other != name.strip() for other in TARGETS), line
    ends = [line.partition("|")[0].strip() for line in lines if "| " in line and "describe" in line]
    assert sorted(ends) == list(TARGETS)


def test_a_target_that_fails_lets_the_others_end_and_is_one_line(project):
    path = project / "configs" / "targets" / "coreml.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"artifact": "model.zip"}))
    with started(project, "coreml", "onnx-cpu") as process:
        said, told = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors(told) == [
        "error: 1 of 2 targets failed: coreml: target 'coreml': artifact 'model.zip' must end in .mlpackage"
    ]
    assert told.rstrip().endswith(errors(told)[0])
    assert built(project) == [FOLDERS[2]]
    assert "onnx-cpu: model.onnx" in said


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_all_and_leaves_nothing(project, name):
    seed = f"seed:{os.getpid()}"
    with started(project, *TARGETS, f"--source={seed}") as process:
        for line in process.stderr:
            if "| " in line and line.partition("|")[2].strip().startswith("quantize"):  # one lowers, one waited for it
                break
        process.send_signal(signal.Signals[name])
        told = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert errors(told) == ["error: interrupted; nothing half-written is left"]
    assert left_running(seed) == []
    assert built(project) == []
    assert [path for path in (project / "build" / "cache").iterdir() if path.name.endswith(".part")] == []


def test_children_of_a_killed_command_end_by_themselves_and_leave_nothing(project):
    seed = f"seed:{os.getpid()}"
    with started(project, *TARGETS, f"--source={seed}") as process:
        for line in process.stderr:
            if "checkpoint" in line:
                break
        process.kill()
    assert left_running(seed, patience_s=120) == []
    assert built(project) == []


def test_too_little_disk_for_all_is_refused_before_any_starts(monkeypatch, tmp_path):
    from export.errors import ExportError
    from export.host import disk
    from export.plan import load_plan

    monkeypatch.setattr(disk, "free_bytes", lambda _: 400 * 10**6)  # enough for each, not for all
    monkeypatch.setattr(parallel, "work", lambda *_: pytest.fail("started"))
    plans = [load_plan("smollm2-135m", "int4-g32", target) for target in TARGETS]
    with pytest.raises(ExportError, match=r"needs 5\d\d\.\d MB on the disk, has 400.0 MB"):
        parallel.build(plans, None, tmp_path / "build", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_who_runs_beside_whom_is_decided_by_memory_and_cores():
    def wanted(gb):
        return Estimate("id", gb * 10**9, 0, 0, 0)

    fit = parallel.Fit({"a": wanted(5), "b": wanted(3), "c": wanted(2)}, 7 * 10**9, 2)
    assert fit.beside("a", [])
    assert not fit.beside("b", ["a"])  # 8 GB
    assert fit.beside("c", ["a"])
    assert not fit.beside("b", ["a", "c"])
    assert parallel.Fit({"a": wanted(9)}, 7 * 10**9, 2).beside("a", [])  # alone: its own preflight refuses it
    assert not parallel.Fit({"a": wanted(1), "b": wanted(1)}, 7 * 10**9, 1).beside("b", ["a"])
