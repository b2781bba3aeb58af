"""`python -m runtime_tests --device …` and `make …` for a device that is missing: one line, before any work."""

import os
import subprocess
import sys

import pytest

from export.manifest import ROOT

TWO = "#!/bin/sh\nprintf 'List of devices attached\\nA1\\tdevice\\nB2\\tdevice\\n'\n"
NONE = "#!/bin/sh\necho List of devices attached\n"


@pytest.fixture
def refused(tmp_path, tiny):
    """The one error line of a command that starts no work; `adb` is the text of a program that lists devices."""

    def run(*words, target="executorch-xnnpack", adb=None):
        environment = {"PATH": f"{tmp_path}:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
        if adb:
            (tmp_path / "adb").write_text(adb)
            (tmp_path / "adb").chmod(0o755)
            environment["ADB"] = str(tmp_path / "adb")
        command = [sys.executable, "-m", "runtime_tests", *words, str(tiny(target))]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert not (tmp_path / "build/records").exists()
        return line

    return run


def test_a_target_it_does_not_run(refused):
    line = refused("--device", "pixel-8", target="onnx-cpu")
    assert "device 'pixel-8' does not run onnx-cpu; it runs executorch-xnnpack" in line


def test_no_phone(refused):
    assert "pixel-8: no Android device is attached" in refused("--device", "pixel-8", adb=NONE)


def test_two_phones_and_no_serial(refused):
    line = refused("--device", "pixel-8", adb=TWO)
    assert "pixel-8: 2 devices are attached (A1, B2): set PIXEL_8_SERIAL" in line


def test_make_gets_no_targets_of_a_device_nobody_knows():
    environment = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "devices", "targets", "nokia-3310"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: unknown device 'nokia-3310'; known: ")
