"""Programs of this host, run with a deadline and never left behind."""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from . import Completed, DeviceError, FloodError

MOST_BYTES = 2**26
"""Of one program's outputs together, unless a caller expects more."""
_AT_ONCE = 2**20
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


def call(
    argv: Sequence[str], deadline: Deadline, *, stdin: IO[bytes] | None = None, most_bytes: int = MOST_BYTES
) -> Completed:
    """Run to the end. Raises TimeoutError, FloodError; then, as after Ctrl-C, the program has been killed."""
    return _finish(_start(argv, stdin or subprocess.DEVNULL), deadline, most_bytes)


def call_held(argv: Sequence[str], deadline: Deadline) -> Completed:
    """Run to the end with a stdin that stays open until then, and ends when this process dies, however it dies.

    At the deadline and after Ctrl-C the program first sees its stdin end and has a moment to clean up. Raises
    TimeoutError, FloodError.
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
        return _finish(child, deadline, MOST_BYTES, held)
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


def _finish(
    child: subprocess.Popen[bytes], deadline: Deadline, most_bytes: int, held: list[int] | None = None
) -> Completed:
    """Wait until the deadline; `held` is closed before the program is killed."""
    outputs = {stream: bytearray() for stream in (child.stdout, child.stderr) if stream}
    try:
        for stream, data in _read(child, deadline):
            outputs[stream] += data
            if sum(map(len, outputs.values())) > most_bytes:
                raise FloodError(f"wrote more than {most_bytes / 2**20:.0f} MiB and was ended")
        child.wait(deadline.left_s())
    except (TimeoutError, subprocess.TimeoutExpired):
        _hang_up(child, held)
        raise TimeoutError(f"no end within {deadline.limit_s:g} s") from None
    except BaseException:
        _hang_up(child, held)
        raise
    for stream in outputs:
        stream.close()
    out, err = map(bytes, outputs.values())
    return Completed(child.returncode, out, err)


def _read(child: subprocess.Popen[bytes], deadline: Deadline) -> Iterator[tuple[IO[bytes], bytes]]:
    """What a program writes, as it comes, until both outputs end. Raises TimeoutError."""
    with selectors.DefaultSelector() as selector:
        for stream in (child.stdout, child.stderr):
            if stream and not stream.closed:
                selector.register(stream, selectors.EVENT_READ, stream)
        while selector.get_map():
            left_s = deadline.left_s()
            ready = selector.select(left_s)
            if not ready or not left_s:
                raise TimeoutError
            for key, _ in ready:
                if data := os.read(key.fd, _AT_ONCE):
                    yield key.data, data
                else:
                    selector.unregister(key.data)


def _hang_up(child: subprocess.Popen[bytes], held: list[int] | None) -> None:
    """End its stdin, wait a moment if it had one, then kill it and everything it started."""
    if held:
        os.close(held.pop())
        with suppress(TimeoutError, subprocess.TimeoutExpired):
            moment = Deadline.after(HANG_UP_S)
            for _ in _read(child, moment):  # what it still says is lost, or it could not end
                pass
            child.wait(moment.left_s())
    with suppress(ProcessLookupError, PermissionError):  # the latter on macOS, of ended ones not waited for yet
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream:
            stream.close()
