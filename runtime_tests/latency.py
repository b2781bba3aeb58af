"""Timings through a session, in the manner of llama-bench: prompts and generation apart, warm-up dropped, raw kept.

Time to first token is the time of one prompt: tokens in, logits of the last one out. Sampling and tokenization are
outside every clock. Runs inside the child process, so that its peak memory is the artifact's.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export import manifest
from export.manifest import Manifest
from export.memory import peak_rss_bytes
from export.plan import WeightScheme
from export.schemes import EMBEDDING, HEAD, bits_each

from .jobs import SpeedJob
from .record import Latency, SpeedTest
from .session import Session, open_session, session_module

NOT_TIMED = "not measured: reference evaluator"


def measure(job: SpeedJob) -> dict[str, Any]:
    """Load, warm up, time every prompt length, then generation; raw samples in nanoseconds."""
    folder = Path(job.folder)
    described = manifest.read(folder)
    session_module(described)  # importing the runtime is not loading the artifact
    before = peak_rss_bytes()
    started = time.perf_counter_ns()
    session = open_session(folder, described, threads=job.threads)
    load_ns = time.perf_counter_ns() - started
    if not session.measures_speed:
        session.close()
        return {"measured": False}
    lengths = [n for n in job.prompts if n + job.generate <= described.contract.kv.context_length]
    first_ns = time_prompt(session, job.tokens[: lengths[0]])
    prompts = {n: repeated_prompt(session, job, n) for n in lengths}
    decode = [time_tokens(session, job, lengths[0]) for _ in range(job.warmups + job.repeats)][job.warmups :]
    session.close()
    return {
        "measured": True,
        "load_ns": load_ns,
        "first_ns": first_ns,
        "prompts": prompts,
        "decode": decode,
        "rss_before_load_bytes": before,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def repeated_prompt(session: Session, job: SpeedJob, length: int) -> list[int]:
    """Nanoseconds of each repeat of one prompt length, after the warm-up."""
    return [time_prompt(session, job.tokens[:length]) for _ in range(job.warmups + job.repeats)][job.warmups :]


def time_prompt(session: Session, tokens: Sequence[int]) -> int:
    """Nanoseconds from tokens to logits, on an empty cache."""
    session.reset()
    started = time.perf_counter_ns()
    session.feed(tokens)
    return time.perf_counter_ns() - started


def time_tokens(session: Session, job: SpeedJob, prompt: int) -> list[int]:
    """Nanoseconds of each generated token after a prompt; choosing the token is not timed."""
    session.reset()
    token = int(session.feed(job.tokens[:prompt]).argmax())
    samples = []
    for _ in range(job.generate):
        started = time.perf_counter_ns()
        logits = session.feed([token])
        samples.append(time.perf_counter_ns() - started)
        token = int(logits.argmax())
    return samples


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading 256 MiB, far beyond the caches, with all threads: the best of five."""
    import torch

    torch.set_num_threads(threads)
    buffer = torch.ones(2**26, dtype=torch.float32)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - started)
    return buffer.numel() * buffer.element_size() / best


def speed_test(n_prompt: int, n_gen: int, samples_ns: Sequence[int]) -> SpeedTest:
    """Samples → mean and deviation, in time and in tokens per second."""
    times: NDArray[np.float64] = np.array(samples_ns, dtype=np.float64)
    rates = (n_gen or n_prompt) * 1e9 / times
    return SpeedTest(
        n_prompt=0 if n_gen else n_prompt,
        n_gen=n_gen,
        avg_ns=float(times.mean()),
        stddev_ns=float(times.std(ddof=1)),
        avg_ts=float(rates.mean()),
        stddev_ts=float(rates.std(ddof=1)),
        samples_ns=tuple(samples_ns),
        samples_ts=tuple(rates.tolist()),
    )


def summarize(raw: dict[str, Any], described: Manifest, threads: int, bandwidth: float | None) -> Latency:
    """What the child measured → the numbers of a record."""
    tests = [speed_test(int(n), 0, samples) for n, samples in raw["prompts"].items()]
    generation = speed_test(0, len(raw["decode"][0]), [sum(repeat) for repeat in raw["decode"]])
    tokens = np.concatenate(raw["decode"]) / 1e9
    third = max(1, len(tokens) // 3)
    per_token = bytes_per_token(described)
    return Latency(
        measured=True,
        note="",
        n_threads=threads,
        model_size=described.artifact_bytes,
        model_n_params=described.architecture.parameters,
        load_s=raw["load_ns"] / 1e9,
        first_inference_s=raw["first_ns"] / 1e9,
        ttft_p50_s=float(np.median(tests[0].samples_ns)) / 1e9,
        tests=(*tests, generation),
        token_p50_s=float(np.quantile(tokens, 0.5)),
        token_p95_s=float(np.quantile(tokens, 0.95)),
        token_samples_ns=tuple(tuple(repeat) for repeat in raw["decode"]),
        cv=max(test.stddev_ns / test.avg_ns for test in (*tests, generation)),
        first_third_ts=float(1 / tokens[:third].mean()),
        last_third_ts=float(1 / tokens[-third:].mean()),
        peak_rss_bytes=raw["peak_rss_bytes"],
        rss_before_load_bytes=raw["rss_before_load_bytes"],
        bytes_per_token=per_token,
        read_bandwidth_bytes_per_s=bandwidth,
        bandwidth_share=per_token * generation.avg_ts / bandwidth if bandwidth else None,
    )


def bytes_per_token(described: Manifest) -> int:
    """Bytes of weights that every decoded token must read: all linears, rotations and the head, with 16-bit scales.

    Of the embedding table one row is read, which is not counted. Never more than the artifact holds (float weights
    may be stored in 16 bits).
    """
    a = described.architecture
    schemes = {
        one.name: WeightScheme(bits=one.bits, group_size=one.group_size) for one in described.quantization.layers
    }
    if a.tie_word_embeddings and EMBEDDING in schemes:
        schemes[HEAD] = schemes[EMBEDDING]
    total = sum(stored_bytes(shape, schemes.get(name)) for name, shape in a.all_linear_shapes().items())
    return min(int(total), described.artifact_bytes)


def stored_bytes(shape: tuple[int, int], scheme: WeightScheme | None) -> float:
    """Integers and scales of one weight [N, K]; float32 where nothing is quantized."""
    bits = 32.0 if scheme is None else bits_each(scheme, shape[1])
    return shape[0] * shape[1] * bits / 8
