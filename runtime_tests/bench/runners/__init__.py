"""How a contender is run and timed: one module per runtime, found by name, imported in the child process only.

Each module has `open_runner(opening)`. Sampling is greedy everywhere.
"""

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from export import manifest
from runtime_tests.jobs import BenchJob, BenchLogitsJob, DepthsJob, Opening, OverheadJob, logits_file, report_progress
from runtime_tests.sessions import open_session, session_module
from runtime_tests.sessions.footprint import peak_bytes
from runtime_tests.sessions.timing import time_tokens


class Pass(NamedTuple):
    """One timed stretch of work."""

    tokens: int
    ns: int


class Runner(ABC):
    """An artifact, loaded."""

    @abstractmethod
    def prompt(self, tokens: Sequence[int]) -> Pass:
        """Time a prompt on an empty cache: tokens in, logits of the last one computed."""

    @abstractmethod
    def generate(self, tokens: Sequence[int], count: int) -> Pass:
        """Time `count` generated tokens after a prompt, which is not timed."""

    @abstractmethod
    def logits(self, tokens: Sequence[int], prefill: int) -> NDArray[np.float32]:
        """Teacher forced: the first `prefill` tokens at once, the others one by one; [tokens - prefill + 1, V]."""

    def windows(self, tokens: Sequence[Sequence[int]], prefill: int) -> Iterator[NDArray[np.float32]]:
        """`logits` of each window; its last token is only a target."""
        for window in tokens:
            yield self.logits(window[:-1], prefill)

    def decode_at(self, positions: Sequence[int], count: int) -> list[list[int]]:
        """For each position, nanoseconds of `count` single tokens, fed to a cache that holds so many others.

        Those are any numbers, in memory of their own: a step's time depends on how many they are. DROPPED tokens come
        first. Raises ValueError: this runtime's cache cannot be written.
        """
        raise ValueError(f"{type(self).__name__} cannot fill its cache but with {max(positions) + count} tokens")

    def peak_rss_bytes(self) -> int:
        """Most memory the process that ran the artifact has held: this one."""
        return peak_bytes()


DROPPED = 2
"""Tokens at a position before those that count."""


class _RunnerModule(Protocol):
    def open_runner(self, opening: Opening) -> Runner:
        """Load an artifact."""


def module(name: str) -> _RunnerModule:
    """The module of that name; importing it imports its runtime."""
    return cast(_RunnerModule, importlib.import_module(f"{__name__}.{name}"))


def measure(job: BenchJob) -> dict[str, Any]:
    """Load, first prompt, every prompt length, generation, the same at a long context.

    Passes as [tokens, ns], warm-up dropped.
    """
    loaded = module(job.opening.runner)  # importing the runtime is not loading the artifact
    started = time.perf_counter_ns()
    runner = loaded.open_runner(job.opening)
    load_ns = time.perf_counter_ns() - started
    first = runner.prompt(job.tokens[: job.prompts[0]])
    prompts = {
        length: [runner.prompt(job.tokens[:length]) for _ in range(1 + job.passes)][1:] for length in job.prompts
    }
    runner.generate(job.tokens[: job.prompts[0]], min(8, job.generate))
    decode = [runner.generate(job.tokens[: job.prompts[0]], job.generate) for _ in range(job.passes)]
    peak = runner.peak_rss_bytes()  # before the long context, which some runtimes answer with logits of every position
    far = [runner.generate(job.tokens[: job.far_prompt], job.far_generate)] if job.far_prompt else []
    return {
        "load_ns": load_ns,
        "first_ns": first.ns,
        "prompts": prompts,
        "decode": decode,
        "far": far,
        "peak_rss_bytes": peak,
        "far_peak_rss_bytes": runner.peak_rss_bytes(),
    }


def measure_depths(job: DepthsJob) -> dict[str, Any]:
    """A prompt, then single tokens from every position on; nanoseconds."""
    runner = module(job.opening.runner).open_runner(job.opening)
    tokens = range(1, job.prompt + 1)
    runner.prompt(tokens)  # packs weights
    return {
        "prompt": runner.prompt(tokens),
        "steps": dict(zip(job.positions, runner.decode_at(job.positions, job.generate), strict=True)),
        "peak_rss_bytes": runner.peak_rss_bytes(),
    }


def write_logits(job: BenchLogitsJob) -> dict[str, Any]:
    """Logits of every window, float32 [W, decode + 1, V], straight to the file."""
    runner = module(job.opening.runner).open_runner(job.opening)
    tokens = np.load(job.tokens)
    shape = (len(tokens), tokens.shape[1] - job.prefill, job.vocab_size)
    with logits_file.writing(job.out, shape) as write:
        for i, logits in enumerate(runner.windows(tokens.tolist(), job.prefill)):
            write(logits)
            report_progress(i + 1, len(tokens))
    return {"windows": len(tokens)}


def measure_overhead(job: OverheadJob) -> dict[str, Any]:
    """Nanoseconds of each step of one of our sessions, and of the runtime's calls inside it: the rest is our code.

    Methods of the runtime's classes are wrapped, so that a session needs no hook. Raises ValueError: a step calls none.
    """
    folder = Path(job.folder)
    described = manifest.read(folder)
    steps, inside = [], []
    with _timed(session_module(described).runtime_calls()) as calls:
        session = open_session(folder, described, threads=job.threads)
        logits = session.feed(job.prompt)
        calls.clear()
        for ns in time_tokens(session.feed, logits, job.generate):
            steps.append(ns)
            inside.append(sum(calls))
            calls.clear()
    if 0 in inside:
        raise ValueError(f"{folder}: a step made none of the runtime's calls that `runtime_calls` names")
    return {"step_ns": steps, "runtime_ns": inside}


@contextmanager
def _timed(methods: list[tuple[type[Any], str]]) -> Iterator[list[int]]:
    """While open, every call of these methods adds its nanoseconds to the list."""
    from unittest.mock import patch  # not for contenders, whose memory is measured

    calls: list[int] = []

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter_ns()
            try:
                return call(*args, **kwargs)
            finally:
                calls.append(time.perf_counter_ns() - started)

        return timed_call

    with ExitStack() as stack:
        for owner, name in methods:
            stack.enter_context(patch.object(owner, name, around(getattr(owner, name))))
        yield calls
