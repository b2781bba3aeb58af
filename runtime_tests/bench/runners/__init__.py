"""How a contender is run and timed: one module per runtime, found by name, imported in the child process only.

Each module has `open_runner(opening)`. Sampling is greedy everywhere.
"""

import importlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from runtime_tests.jobs import BenchJob, BenchLogitsJob, Opening, logits_file, report_progress


class Pass(NamedTuple):
    """One timed stretch of work."""

    tokens: int
    ns: int


class _Runner(Protocol):
    def prompt(self, tokens: Sequence[int]) -> Pass:
        """Time a prompt on an empty cache: tokens in, logits of the last one computed."""

    def generate(self, tokens: Sequence[int], count: int) -> Pass:
        """Time `count` generated tokens after a prompt, which is not timed."""

    def logits(self, tokens: Sequence[int], prefill: int) -> NDArray[np.float32]:
        """Teacher forced: the first `prefill` tokens at once, the others one by one; [tokens - prefill + 1, V]."""

    def peak_rss_bytes(self) -> int:
        """Most memory the process that ran the artifact has held."""


class _RunnerModule(Protocol):
    def open_runner(self, opening: Opening) -> _Runner:
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


def write_logits(job: BenchLogitsJob) -> dict[str, Any]:
    """Logits of every window, float32 [W, decode + 1, V], straight to the file."""
    runner = module(job.opening.runner).open_runner(job.opening)
    tokens = np.load(job.tokens)[:, :-1]  # the last token is only a target
    shape = (len(tokens), tokens.shape[1] - job.prefill + 1, job.vocab_size)
    with logits_file.writing(job.out, shape) as write:
        for i, window in enumerate(tokens.tolist()):
            write(runner.logits(window, job.prefill))
            report_progress(i + 1, len(tokens))
    return {"windows": len(tokens)}
