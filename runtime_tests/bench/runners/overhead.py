"""How much of a decode step is our own code: the runtime's calls are timed inside timed steps of our sessions.

Methods of the runtimes' classes are wrapped, so that a session needs no hook; a step that calls none is an error.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from export import manifest
from runtime_tests.jobs import OverheadJob
from runtime_tests.sessions import open_session, session_module
from runtime_tests.sessions.timing import time_tokens

P = ParamSpec("P")
T = TypeVar("T")


def measure(job: OverheadJob) -> dict[str, Any]:
    """Nanoseconds of each step, and of the runtime's calls in it."""
    folder = Path(job.folder)
    described = manifest.read(folder)
    clock = _CallClock()
    steps, calls = [], []
    with timed(session_module(described).runtime_calls(), clock):
        session = open_session(folder, described, threads=job.threads)
        logits = session.feed(job.prompt)
        clock.ns = 0
        for ns in time_tokens(session.feed, logits, job.generate):
            steps.append(ns)
            calls.append(clock.ns)
            clock.ns = 0
    if 0 in calls:
        raise ValueError(f"{folder}: a step made none of the runtime's calls that `runtime_calls` names")
    return {"step_ns": steps, "runtime_ns": calls}


class _CallClock:
    def __init__(self) -> None:
        self.ns = 0

    def around(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same call, which adds its time."""

        @wraps(call)
        def timed_call(*args: P.args, **kwargs: P.kwargs) -> T:
            started = time.perf_counter_ns()
            try:
                return call(*args, **kwargs)
            finally:
                self.ns += time.perf_counter_ns() - started

        return timed_call


@contextmanager
def timed(methods: list[tuple[type[Any], str]], clock: _CallClock) -> Iterator[None]:
    """While open, calls of these methods add to the clock."""
    originals = [getattr(owner, name) for owner, name in methods]
    try:
        for (owner, name), original in zip(methods, originals, strict=True):
            setattr(owner, name, clock.around(original))
        yield
    finally:
        for (owner, name), original in zip(methods, originals, strict=True):
            setattr(owner, name, original)
