"""Run a job in a child process: whatever happens there, a crash too, comes back as an outcome.

Knows nothing about what the job does.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from export import disk
from export.manifest import ROOT

from .jobs import Job
from .record import Outcome

WORKER: tuple[str, ...] = (sys.executable, "-m", "runtime_tests.worker")
DISK_FULL = "disk-full"
"""What a child says of a disk of this machine: no outcome, for it tells nothing of an artifact."""
Progress = Callable[[int, int], None]
FAILURES = {outcome.value: outcome for outcome in (Outcome.LOAD_FAIL, Outcome.RUN_FAIL, Outcome.SOURCE_DIFFERS)}


@dataclass(frozen=True)
class Ended:
    """How a child process ended."""

    outcome: Outcome
    detail: str
    """One line; empty when it went well."""
    result: dict[str, Any] = field(default_factory=dict)


def run(job: Job, *, limit_s: float, on_progress: Progress | None = None, renewed: bool = False) -> Ended:
    """Run a job; end its whole process group after `limit_s` seconds.

    `renewed`: every report of progress starts them anew, for work that takes hours and still must not hang.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # A session of its own makes the child the leader of a group, so that what it starts can be ended with it.
        child = subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=out, stderr=err, cwd=ROOT, start_new_session=True
        )
        try:
            hand_over(child, job)
            finished = watch(child, out, limit_s, on_progress, renewed=renewed)
        finally:
            end_group(child)
        if not finished:
            return Ended(Outcome.TIMEOUT, f"no {'progress' if renewed else 'answer'} within {limit_s:g} s")
        return interpret(child.returncode, read_from(out), read_from(err))


def hand_over(child: subprocess.Popen[bytes], job: Job) -> None:
    """Give the job on stdin; a child that died before reading it is judged by its exit."""
    assert child.stdin is not None
    try:
        child.stdin.write(job.model_dump_json().encode())
        child.stdin.close()
    except BrokenPipeError:
        pass


def watch(
    child: subprocess.Popen[bytes], out: IO[bytes], limit_s: float, on_progress: Progress | None, *, renewed: bool
) -> bool:
    """Wait for the end, passing progress on; False when the limit comes first."""
    deadline = time.monotonic() + limit_s
    last_seen = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            child.wait(timeout=min(0.1, left))
            return True
        except subprocess.TimeoutExpired:
            line = last_line(read_from(out)) if on_progress else ""
            if on_progress and (seen := parse(line)) and "done" in seen:
                on_progress(int(seen["done"]), int(seen["total"]))
                if renewed and seen != last_seen:
                    deadline, last_seen = time.monotonic() + limit_s, seen
    return False


def end_group(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and everything it started, and collect it."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def read_from(file: IO[bytes]) -> str:
    """The last 64 KiB of an output the child may still write to; its own file position is left alone."""
    size = os.fstat(file.fileno()).st_size
    start = max(0, size - 2**16)
    return os.pread(file.fileno(), size - start, start).decode("utf-8", errors="replace")


def interpret(returncode: int, out: str, err: str) -> Ended:
    """Exit status and outputs → outcome. The last line of stdout is the answer. Raises disk.FullError."""
    if returncode < 0:
        return Ended(Outcome.CRASH, died_by(-returncode, last_line(err)))
    answer = parse(last_line(out))
    if returncode != 0:
        if answer and answer.get("failed") == DISK_FULL:
            raise disk.FullError(str(answer.get("error", "")))
        if answer and answer.get("failed") in FAILURES:
            return Ended(FAILURES[answer["failed"]], str(answer.get("error", "")))
        return Ended(Outcome.RUN_FAIL, f"exit {returncode}: {last_line(err) or 'no message'}")
    if not answer or not isinstance(answer.get("result"), dict):
        return Ended(Outcome.RUN_FAIL, f"no JSON result in the last line of its output: {last_line(out)[:120]!r}")
    return Ended(Outcome.PASS, "", answer["result"])


def died_by(number: int, last_words: str) -> str:
    """A signal by name, with its usual cause."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"died by {name}{hint}" + (f": {last_words}" if last_words else "")


def last_line(text: str) -> str:
    """The last line that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def parse(line: str) -> dict[str, Any] | None:
    """A JSON object, or None."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
