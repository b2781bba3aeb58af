"""Programs of this host, run with a deadline and never left behind."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from . import Completed, DeviceError

HANG_UP_S = 5
"""How long a program gets to end by itself once its stdin has ended."""


@dataclass(frozen=True)
class Deadline:
    """One moment that several steps share."""

    limit_s: float
    at: float

    @classmethod
    def after(cls, limit_s: float) -> "Deadline":
        """That many seconds from now."""
        return cls(limit_s, time.monotonic() + limit_s)

    def left_s(self) -> float:
        """Seconds until then, never negative."""
        return max(0.0, self.at - time.monotonic())


def call(argv: Sequence[str], deadline: Deadline, *, stdin: IO[bytes] | None = None) -> Completed:
    """Run to the end. Raises TimeoutError; then, as after Ctrl-C, the program has been killed."""
    return _finish(_start(argv, stdin or subprocess.DEVNULL), deadline)


def call_held(argv: Sequence[str], deadline: Deadline) -> Completed:
    """Run to the end with a stdin that stays open until then, and ends when this process dies, however it dies.

    At the deadline and after Ctrl-C the program first sees its stdin end and has a moment to clean up. Raises
    TimeoutError.
    """
    reading, writing = os.pipe()
    try:
        child = _start(argv, reading)
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    held = [writing]
    try:
        return _finish(child, deadline, held)
    finally:
        for end in held:
            os.close(end)


def _start(argv: Sequence[str], stdin: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Raises DeviceError: of another processor, or without its interpreter."""
    try:
        return subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us
        )
    except OSError as error:
        raise DeviceError(f"{argv[0]}: cannot be started ({error.strerror}); install it again") from None


def _finish(child: subprocess.Popen[bytes], deadline: Deadline, held: list[int] | None = None) -> Completed:
    """Wait until the deadline; `held` is closed before the program is killed."""
    try:
        out, err = child.communicate(timeout=deadline.left_s())
    except subprocess.TimeoutExpired:
        _hang_up(child, held)
        raise TimeoutError(f"no end within {deadline.limit_s:g} s") from None
    except BaseException:
        _hang_up(child, held)
        raise
    return Completed(child.returncode, out, err)


def _hang_up(child: subprocess.Popen[bytes], held: list[int] | None) -> None:
    """End its stdin, wait a moment if it had one, then kill it and everything it started."""
    if held:
        os.close(held.pop())
        with suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=HANG_UP_S)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream:
            stream.close()
