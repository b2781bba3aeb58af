"""What the child process does for one contender: load, time, or write logits. Knows no contender by name."""

import time
from typing import Any

import numpy as np

from .. import logits_file
from ..jobs import BenchJob, BenchLogitsJob, report_progress
from . import runners


def measure(job: BenchJob) -> dict[str, Any]:
    """Load, first prompt, every prompt length, generation, the same at a long context.

    Passes as [tokens, ns], warm-up dropped.
    """
    module = runners.module(job.opening.runner)  # importing the runtime is not loading the artifact
    started = time.perf_counter_ns()
    runner = module.open_runner(job.opening)
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
    runner = runners.module(job.opening.runner).open_runner(job.opening)
    tokens = np.load(job.tokens)[:, :-1]  # the last token is only a target
    shape = (len(tokens), tokens.shape[1] - job.prefill + 1, job.vocab_size)
    with logits_file.writing(job.out, shape) as write:
        for i, window in enumerate(tokens.tolist()):
            write(runner.logits(window, job.prefill))
            report_progress(i + 1, len(tokens))
    return {"windows": len(tokens)}
