"""Processes of tests: commands to which something happens on the way, time limits, emulated devices, what is left."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from devices import lab
from export import manifest

FAKES = Path(__file__).parent / "fakes"


def arguments(*orders):
    """The command line that starts `fakes/command.py`."""
    return [sys.executable, str(FAKES / "command.py"), json.dumps(orders)]


def results(*orders, **options):
    done = subprocess.run(
        arguments(*orders), cwd=manifest.ROOT, capture_output=True, text=True, timeout=300, check=True, **options
    )
    return json.loads(done.stdout.splitlines()[-1])


def one_error(stderr):
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, stderr
    assert stderr.rstrip().endswith(errors[0])
    return errors[0]


@contextmanager
def within(seconds):
    """A hang becomes a failure: after so many seconds of processor time, or ten times as many on the clock."""

    def stop(_signum, _frame):
        pytest.fail(f"still at it after {seconds} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 10 * seconds)}
    before = {number: signal.signal(number, stop) for number in timers}
    try:
        for timer, limit in timers.values():
            signal.setitimer(timer, limit)
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextmanager
def emulated(name, **size):
    """A device of the lab; skips only where a Debian package, root or a kernel feature is missing, and says which."""
    if lack := lab.lacks():
        pytest.skip(f"needs {lack}")
    with lab.start(name, **size) as machine:
        yield machine


def left_running(marker, patience_s=5.0):
    """Command lines that hold the marker when the patience is over; empty as soon as there are none."""
    deadline = time.monotonic() + patience_s
    while (found := matching(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def sleeps(marker, patience_s=20.0):
    """Wait for `sleep MARKER` on a device."""
    deadline = time.monotonic() + patience_s
    while not any(words.endswith(f"sleep {marker}") for words in matching(marker)):
        assert time.monotonic() < deadline, f"{marker} did not start"
        time.sleep(0.05)


def matching(marker):
    return [words for process in psutil.process_iter() if marker in (words := command_line(process))]


def command_line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
