"""A child process that runs one job after another: its libraries are imported once for all of them."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import IO

from export.host import processes
from export.host.processes import OUTPUT_BYTES, last_line

_EVERY_S = 0.02
_LAST_LINES = 2**16
"""Bytes in which the last line is looked for."""


class Child:
    """Started by the first job; one that ends it leaves the others a new one. Whatever a job started ends with it."""

    def __init__(self, settings: Sequence[str] = ()) -> None:
        """`settings`: environment variables beside ours, `NAME=value`."""
        self._settings = tuple(settings)
        self._files = ExitStack()
        self._started: tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]] | None = None

    def run(
        self,
        command: Sequence[str],
        job: bytes,
        *,
        limit_s: float,
        answers: Callable[[str], bool],
        watch: Callable[[str], object],
    ) -> tuple[int | None, str, str]:
        """A job's stdout and stderr, after a line that `answers` holds for (None), or after the child's exit status.

        `watch` gets the last line a few times each second. Raises TimeoutError.
        """
        process, out, err = self._running(command)
        assert process.stdin
        starts = [os.fstat(file.fileno()).st_size for file in (out, err)]
        deadline = time.monotonic() + limit_s
        try:
            with suppress(BrokenPipeError):  # it has ended, and its exit status says how
                process.stdin.write(job + b"\n")
                process.stdin.flush()
            while True:
                status = process.poll()
                line = last_line(_end(out, starts[0], _LAST_LINES))
                if status is not None or answers(line):
                    break
                watch(line)
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"no end within {limit_s:g} s")
                time.sleep(_EVERY_S)
            said = [_end(file, start, OUTPUT_BYTES) for file, start in zip((out, err), starts, strict=True)]
        except BaseException:
            self.close()
            raise
        if status is not None:
            self.close()
        return status, said[0], said[1]

    def close(self) -> None:
        """End the child with all that it started."""
        if self._started:
            process, *_ = self._started
            assert process.stdin
            processes.end_group(process.pid)
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        self._files.close()
        self._started = None

    def _running(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
        if self._started is None:
            with ExitStack() as files:
                out, err = files.enter_context(tempfile.TemporaryFile()), files.enter_context(tempfile.TemporaryFile())
                self._files = files.pop_all()
            process = subprocess.Popen(
                ("env", *self._settings, *command),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                start_new_session=True,  # it leads a process group, so that what it starts can be ended with it
            )
            self._started = process, out, err
        return self._started


def _end(file: IO[bytes], start: int, most_bytes: int) -> str:
    """What was written behind `start`, its end where that is much; the file position, which is the child's, stays."""
    size = os.fstat(file.fileno()).st_size
    first = max(start, size - most_bytes)
    return os.pread(file.fileno(), size - first, first).decode("utf-8", errors="replace")
