"""Timings through a session as llama-bench takes them: prompts and generation apart, warm-up dropped.

Time to first token is the time of one prompt: tokens in, logits of the last one out. Sampling and tokenization are
not timed. `measure` runs in a child process whose peak memory is recorded as the artifact's, so nothing that this
module imports may load torch.
"""

import time
from pathlib import Path
from typing import Any

from export import manifest
from runtime_tests.jobs import SpeedJob
from runtime_tests.sessions import Session, open_session, session_module
from runtime_tests.sessions.footprint import peak_bytes
from runtime_tests.sessions.timing import time_prompt, time_tokens

NOT_TIMED = "not measured: reference evaluator"


def measure(job: SpeedJob) -> dict[str, Any]:
    """Load, warm up, time every prompt length, then generation; raw samples in nanoseconds."""
    folder = Path(job.folder)
    described = manifest.read(folder)
    session_module(described)  # importing the runtime is not loading the artifact
    before = peak_bytes()
    started = time.perf_counter_ns()
    session = open_session(folder, described, threads=job.threads)
    load_ns = time.perf_counter_ns() - started
    if not session.measures_speed:
        session.close()
        return {"measured": False}
    lengths = [n for n in job.prompts if n + job.generate <= described.contract.kv.context_length]
    first_ns = time_prompt(session, job.tokens[: lengths[0]])
    passes = range(job.warmups + job.repeats)
    prompts = {n: [time_prompt(session, job.tokens[:n]) for _ in passes][job.warmups :] for n in lengths}
    decode = [_time_answer(session, job, lengths[0]) for _ in passes][job.warmups :]
    session.close()
    return {
        "measured": True,
        "load_ns": load_ns,
        "first_ns": first_ns,
        "prompts": prompts,
        "decode": decode,
        "rss_before_load_bytes": before,
        "peak_rss_bytes": peak_bytes(),
    }


def _time_answer(session: Session, job: SpeedJob, prompt: int) -> list[int]:
    """Nanoseconds of each generated token after a prompt."""
    session.reset()
    return list(time_tokens(session.feed, session.feed(job.tokens[:prompt]), job.generate))


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading 256 MiB, far more than caches hold, with so many threads: the best of six passes."""
    import torch

    torch.set_num_threads(threads)
    buffer = torch.ones(2**26, dtype=torch.float32)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - started)
    return buffer.numel() * buffer.element_size() / best
