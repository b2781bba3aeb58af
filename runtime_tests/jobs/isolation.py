"""Runs a job in a child process: whatever happens there, even a crash, comes back as an outcome."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.host import disk, interrupt, processes
from export.host.processes import last_line
from runtime_tests.evidence.record import Outcome

from . import Job
from .child import Child

WORKER: tuple[str, ...] = processes.python("runtime_tests.jobs.worker")
DISK_FULL = "disk-full"
"""A child's failure that is no outcome, since it tells nothing about the artifact: this machine's disk is full."""
Progress = Callable[[int, int], None]
_OF_JOBS = (Outcome.LOAD_FAIL, Outcome.RUN_FAIL, Outcome.SOURCE_MISSING, Outcome.SOURCE_DIFFERS)
_FAILURES = {outcome.value: outcome for outcome in _OF_JOBS}


@dataclass(frozen=True)
class Ended:
    """How a child process ended."""

    outcome: Outcome
    detail: str
    """One line; empty for a pass."""
    result: dict[str, Any] = field(default_factory=dict)


def run(
    job: Job,
    *,
    limit_s: float,
    on_progress: Progress | None = None,
    renewed: bool = False,
    settings: tuple[str, ...] = (),
    child: Child | None = None,
) -> Ended:
    """Run a job; end its whole process group after `limit_s` seconds. Raises disk.FullError.

    `renewed`: every report of progress restarts the limit, for work of hours that must not hang either.
    `settings`: environment variables of the child beside ours, `NAME=value`. `child`: one that runs other jobs too.
    """
    last_seen = None
    command = ("env", *settings, *WORKER)

    def watch(line: str) -> bool:
        nonlocal last_seen
        interrupt.check()  # only the main thread is told, and this may be another
        if not on_progress or not (progress := _parse(line)) or "done" not in progress:
            return False
        on_progress(int(progress["done"]), int(progress["total"]))
        before, last_seen = last_seen, progress
        return renewed and progress != before

    try:
        given = job.model_dump_json().encode()
        if child:
            status, out, err = child.run(WORKER, given, limit_s=limit_s, answers=_answers, watch=watch)
            return interpret(_status_of(out) if status is None else status, out, err)
        exited = processes.run(command, cwd=Path.cwd(), given=given, limit_s=limit_s, watch=watch)
    except TimeoutError:
        return Ended(Outcome.TIMEOUT, f"no {'progress' if renewed else 'answer'} within {limit_s:g} s")
    return interpret(exited.returncode, exited.out, exited.err)


def _answers(line: str) -> bool:
    """Whether it is the end of a job."""
    answer = _parse(line)
    return answer is not None and not answer.keys().isdisjoint(("result", "failed"))


def _status_of(out: str) -> int:
    """What the child would have exited with after this answer."""
    return 0 if "result" in (_parse(last_line(out)) or {}) else 1


def interpret(returncode: int, out: str, err: str) -> Ended:
    """The outcome by exit status and outputs; the last line of stdout is the answer. Raises disk.FullError."""
    if returncode < 0:
        return Ended(Outcome.CRASH, _died_by(-returncode, last_line(err)))
    answer = _parse(last_line(out))
    if returncode != 0:
        if answer and answer.get("failed") == DISK_FULL:
            raise disk.FullError(str(answer.get("error", "")))
        if answer and answer.get("failed") in _FAILURES:
            return Ended(_FAILURES[answer["failed"]], str(answer.get("error", "")))
        return Ended(Outcome.RUN_FAIL, f"exit {returncode}: {last_line(err) or 'no message'}")
    if not answer or not isinstance(answer.get("result"), dict):
        return Ended(Outcome.RUN_FAIL, f"no JSON result in the last line of its output: {last_line(out)[:120]!r}")
    return Ended(Outcome.PASS, "", answer["result"])


def _died_by(number: int, last_words: str) -> str:
    name = processes.signal_name(number)
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"died by {name}{hint}" + (f": {last_words}" if last_words else "")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
