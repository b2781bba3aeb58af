"""How `python -m devices` and `python -m devices.lab` end: one line and an exit code, never a traceback."""

import os
import subprocess
import sys

import pytest

from devices.transports import ssh
from export.manifest import ROOT
from tests.support.reliability import FOREIGN_WORDS

pytestmark = FOREIGN_WORDS


def end_of(words, redirection=""):
    """Exit code, stdout and stderr of a command under a shell's redirection. No adb server is started."""
    script = f'ADB=false exec "$0" -m {words} {redirection}'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", ["devices targets host", "devices"])
@pytest.mark.parametrize(
    ("redirection", "code", "line"),
    [
        pytest.param(">/dev/full", 1, "error: standard output: No space left on device\n", marks=pytest.mark.linux),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(words, redirection, code, line):
    assert end_of(words, redirection) == (code, "", line)


def test_a_reader_that_has_gone_is_told_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "devices", "targets", "host"],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("words", "redirection", "code", "line"),
    [
        pytest.param(
            "devices targets nokia", ">/dev/full", 1, "error: unknown device 'nokia'; known: ", marks=pytest.mark.linux
        ),
        ("devices.lab run nokia -- true", "", 1, "error: unknown device 'nokia'; known: "),
        pytest.param(
            "devices.lab run host -- no-such-program",
            ">/dev/full",
            1,
            "error: no-such-program: No such file or directory",
            marks=pytest.mark.linux,
        ),
        pytest.param("devices targets nokia", "2>/dev/full", 1, "", marks=pytest.mark.linux),
        pytest.param("devices.lab run nokia -- true", ">/dev/full 2>/dev/full", 1, "", marks=pytest.mark.linux),
        ("devices nonsense", ">&-", 2, "The known devices."),
        ("devices.lab nonsense", "", 2, "The emulated devices"),
    ],
)
def test_a_mistake_is_one_line(words, redirection, code, line):
    ended, _, err = end_of(words, redirection)
    assert ended == code
    assert err.lstrip().startswith(line)


def test_one_device_that_cannot_be_asked_hides_no_other(monkeypatch, capsys):
    from devices import __main__ as command

    def fail(*_, **options):
        raise PermissionError(13, "Permission denied", "/usr/bin/ssh")

    monkeypatch.setattr(ssh.subprocess, "Popen", fail)
    monkeypatch.setenv("RASPBERRY_PI_5_HOST", "board")
    monkeypatch.setenv("ADB", "false")
    assert command.main([]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "[Errno 13] Permission denied: '/usr/bin/ssh'" in lines["raspberry-pi-5"]
