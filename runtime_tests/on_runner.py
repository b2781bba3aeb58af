"""Jobs as scripts of the runner protocol (docs/runner.md), and answers as what a job gives. Knows no device.

What `worker` does with a session in a child process, the runner does on a device; both answer alike.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conformance import PROBE
from .jobs import ConformanceJob, GenerateJob, SpeedJob
from .record import Outcome
from .runner import Answer, Command, Feed, Generate, Logits, Reset

LOGITS_BYTES = 2**27
"""Most logits of one run: they lie on the device until they are fetched."""


class RunnerStoppedError(Exception):
    """A run that gave no answer."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


Execute = Callable[[Sequence[Command]], tuple[Answer, NDArray[np.float32]]]
"""Runs a script: the answer, and the rows of logits [R, V]. Raises RunnerStoppedError."""


def window_scripts(tokens: NDArray[np.int64], prefill: int, vocab: int) -> Iterator[tuple[slice, list[Command]]]:
    """Scripts that prefill each window [W, T] and then feed it token by token, as many windows as one run may hold."""
    rows = tokens.shape[1] - prefill
    step = max(1, LOGITS_BYTES // (rows * vocab * 4))
    for start in range(0, len(tokens), step):
        part = slice(start, min(start + step, len(tokens)))
        yield part, [command for window in tokens[part].tolist() for command in window_commands(window, prefill)]


def window_commands(window: Sequence[int], prefill: int) -> list[Command]:
    """One window; its last token is only a target."""
    commands: list[Command] = [Reset(), Feed(tuple(window[:prefill])), Logits()]
    for token in window[prefill:-1]:
        commands += [Feed((token,)), Logits()]
    return commands


def generate(job: GenerateJob, execute: Execute) -> dict[str, Any]:
    """Greedy tokens after a prompt."""
    answer, _ = execute([Reset(), Feed(job.prompt), Generate(job.count)])
    return {"tokens": list(answer.generated[0].tokens)}


def conformance(job: ConformanceJob, context_length: int, execute: Execute) -> dict[str, Any]:
    """The promises of `conformance.check`."""
    first, more = tuple(range(1, PROBE + 1)), tuple(range(PROBE + 1, 2 * PROBE))
    full = tuple(1 + i % PROBE for i in range(context_length - 1))
    script: list[Command] = [Reset(), Feed(first), Logits(), Feed(more), Reset(), Feed(first), Logits()]
    if job.fill:
        script += [Reset(), Feed(full), Feed((1,)), Logits()]
    _, (before, after, *last) = execute(script)
    failures = []
    difference = float(np.abs(before - after).max() / np.abs(before).max())
    if not difference <= 1e-4:
        failures.append(f"after a reset the logits differ by {difference:.1e} of the largest")
    if not np.isfinite(np.array(last)).all():
        failures.append(f"logits at the last position, {context_length - 1}, are not finite")
    if not refuses(execute, [Reset(), Feed(first), Feed(full[: context_length - PROBE + 1])]):
        failures.append(f"a token past the context of {context_length} was accepted")
    return {"failures": failures}


def refuses(execute: Execute, script: Sequence[Command]) -> bool:
    """Whether a script ends as a run error."""
    try:
        execute(script)
    except RunnerStoppedError as stop:
        if stop.outcome is not Outcome.RUN_FAIL:
            raise
        return True
    return False


def speed(job: SpeedJob, context_length: int, execute: Execute) -> dict[str, Any]:
    """Load, warm up, every prompt length, then generation, as `latency.measure` does it: nanoseconds."""
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
        "decode": [list(made.ns) for made in answer.generated[job.warmups :]],
        "rss_before_load_bytes": answer.rss_before_load_bytes,
        "peak_rss_bytes": answer.peak_rss_bytes,
    }
