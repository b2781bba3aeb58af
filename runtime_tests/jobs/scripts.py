"""Jobs as scripts of the runner protocol (docs/runner.md), and the runner's answers as results of jobs.

`worker` executes a job with a session in a child process, a runner executes its script on a device; the results are
the same.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_tests.checks.conformance import broken_promises
from runtime_tests.device_runner import Answer, Command, Feed, Generate, Logits, Reset
from runtime_tests.evidence.record import Outcome

from . import ConformanceJob, GenerateJob, SpeedJob

LOGITS_BYTES = 2**27
"""Most logits of one run: they are stored on the device until they are fetched."""


class RunnerStoppedError(Exception):
    """A run that gave no answer."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


Execute = Callable[[Sequence[Command]], tuple[Answer, NDArray[np.float32]]]
"""Runs a script and returns its answer and rows of logits [R, V]. Raises RunnerStoppedError."""


def window_scripts(
    tasks: Sequence[tuple[NDArray[np.int64], int]], vocab: int
) -> Iterator[tuple[list[tuple[int, int]], list[Command]]]:
    """Scripts that prefill every window [T] of each (windows [W, T], prefill) and feed its other tokens one by one.

    A script holds as many as may run, whichever task they are of: a runner takes seconds to start. With it come, for
    each of its windows, the task and the number of rows of logits.
    """
    parts: list[tuple[int, int]] = []
    script: list[Command] = []
    for task, (windows, prefill) in enumerate(tasks):
        rows = windows.shape[1] - prefill
        for window in windows.tolist():
            if parts and (sum(many for _, many in parts) + rows) * vocab * 4 > LOGITS_BYTES:
                yield parts, script
                parts, script = [], []
            parts.append((task, rows))
            script += _window_commands(window, prefill)
    if parts:
        yield parts, script


def _window_commands(window: Sequence[int], prefill: int) -> list[Command]:
    """One window; its last token is a target only."""
    commands: list[Command] = [Reset(), Feed(tuple(window[:prefill])), Logits()]
    for token in window[prefill:-1]:
        commands += [Feed((token,)), Logits()]
    return commands


def generate(job: GenerateJob, execute: Execute) -> dict[str, Any]:
    """Greedy tokens after a prompt."""
    answer, _ = execute([Reset(), Feed(job.prompt), Generate(job.count)])
    return {"tokens": list(answer.generated[0].tokens)}


def conformance(job: ConformanceJob, context_length: int, execute: Execute, *, endless: bool = False) -> dict[str, Any]:
    """Descriptions of the promises that a device's runner breaks."""
    failures = broken_promises(
        lambda script: execute(script)[1], partial(_refuses, execute), context_length, fill=job.fill, endless=endless
    )
    return {"failures": failures}


def _refuses(execute: Execute, script: Sequence[Command]) -> bool:
    try:
        execute(script)
    except RunnerStoppedError as stop:
        if stop.outcome is not Outcome.RUN_FAIL:
            raise
        return True
    return False


def speed(job: SpeedJob, context_length: int, execute: Execute) -> dict[str, Any]:
    """Load, warm-up, every prompt length, then generation, as in `latency.measure`; nanoseconds."""
    lengths = [n for n in job.prompts if n + job.generate <= context_length]
    passes = job.warmups + job.repeats
    script: list[Command] = [Reset(), Feed(job.tokens[: lengths[0]])]
    for n in lengths:
        script += [Reset(), Feed(job.tokens[:n])] * passes
    script += [Reset(), Feed(job.tokens[: lengths[0]]), Generate(job.generate)] * passes
    answer, _ = execute(script)
    feeds = [feed.ns for feed in answer.feeds]
    starts = [1 + i * passes for i in range(len(lengths))]
    return {
        "measured": True,
        "load_ns": answer.load_ns,
        "first_ns": feeds[0],
        "prompts": {n: feeds[start + job.warmups : start + passes] for n, start in zip(lengths, starts, strict=True)},
        "decode": [list(generated.ns) for generated in answer.generated[job.warmups :]],
        "rss_before_load_bytes": answer.rss_before_load_bytes,
        "peak_rss_bytes": answer.peak_rss_bytes,
    }
