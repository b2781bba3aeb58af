"""How much of a decode step is our own code: the runtime's calls are timed inside timed steps of our sessions.

The calls are found at the runtimes' classes, so that a session needs no hook; a step without one is an error.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from export import manifest

from ..jobs import OverheadJob
from ..session import open_session

P = ParamSpec("P")
T = TypeVar("T")


def runtime_methods(session: str) -> list[tuple[type[Any], str]]:
    """Class and method of every call by which a session of ours hands work to its runtime."""
    match session:
        case "onnx_kv":
            from onnxruntime import InferenceSession

            return [(InferenceSession, "run"), (InferenceSession, "run_with_iobinding")]
        case "pte":
            from executorch.runtime import Method

            return [(Method, "execute")]
    raise ValueError(f"the runtime calls of session {session!r} are not known here")


def measure(job: OverheadJob) -> dict[str, Any]:
    """Nanoseconds of each step, and of the runtime's calls in it."""
    folder = Path(job.folder)
    described = manifest.read(folder)
    clock = CallClock()
    with timed(runtime_methods(described.plan.target.session), clock):
        session = open_session(folder, described, threads=job.threads)
        token = int(session.feed(job.prompt).argmax())
        steps, calls = [], []
        for _ in range(job.generate):
            clock.ns = 0
            started = time.perf_counter_ns()
            logits = session.feed([token])
            steps.append(time.perf_counter_ns() - started)
            calls.append(clock.ns)
            token = int(logits.argmax())
    if 0 in calls:
        raise ValueError(f"{folder}: a step made no call of the runtime that is known here")
    return {"step_ns": steps, "runtime_ns": calls}


class CallClock:
    """Time spent in wrapped calls."""

    def __init__(self) -> None:
        self.ns = 0

    def around(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same call, its time added."""

        @wraps(call)
        def timed_call(*args: P.args, **kwargs: P.kwargs) -> T:
            started = time.perf_counter_ns()
            try:
                return call(*args, **kwargs)
            finally:
                self.ns += time.perf_counter_ns() - started

        return timed_call


@contextmanager
def timed(methods: list[tuple[type[Any], str]], clock: CallClock) -> Iterator[None]:
    """While open, calls of these methods add to the clock."""
    originals = [getattr(owner, name) for owner, name in methods]
    try:
        for (owner, name), original in zip(methods, originals, strict=True):
            setattr(owner, name, clock.around(original))
        yield
    finally:
        for (owner, name), original in zip(methods, originals, strict=True):
            setattr(owner, name, original)
