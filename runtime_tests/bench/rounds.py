"""The interleaved measurement: every repetition runs each contender once, in a new process, in rotating order."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.progress import console

from .. import isolation
from ..isolation import Ended
from ..jobs import BandwidthJob, BenchJob, OverheadJob
from ..record import Outcome
from .contenders import Contender
from .ratios import rotated
from .results import HostOverhead, Sample, Settings
from .timing import Timing

LIMIT_S = 900.0
"""Longest one contender may take in one repetition."""


def measure(
    contenders: Sequence[Contender], settings: Settings, tokens: Sequence[int], repetition: int
) -> Iterator[Sample]:
    """One repetition: samples as they come, a line each; a contender that dies is a sample too, and the run goes on."""
    for position, contender in enumerate(rotated(contenders, repetition)):
        load = os.getloadavg()[0]
        ended = isolation.run(job(contender, settings, tokens), limit_s=LIMIT_S)
        sample = sample_of(contender.entry.name, repetition, position, load, ended)
        console.print(f"  {repetition + 1}/{settings.repetitions} {line(sample)}", soft_wrap=True, markup=False)
        yield sample


def read_bandwidth(threads: int) -> float:
    """Bytes per second that this machine reads now."""
    ended = isolation.run(BandwidthJob(threads=threads), limit_s=LIMIT_S)
    return float(required(ended, "memory bandwidth")["bytes_per_s"])


def overhead(label: str, folder: Path, settings: Settings, tokens: Sequence[int]) -> HostOverhead:
    """One of our sessions, step by step."""
    prompt = tuple(tokens[: settings.prompts[0]])
    asked = OverheadJob(folder=str(folder), threads=settings.threads, prompt=prompt, generate=settings.generate)
    return HostOverhead.model_validate({"label": label} | required(isolation.run(asked, limit_s=LIMIT_S), label))


def required(ended: Ended, what: str) -> dict[str, Any]:
    """The result of a job without which there is no benchmark."""
    if ended.outcome is not Outcome.PASS:
        raise ExportError(f"{what}: {ended.outcome.value}: {ended.detail}")
    return ended.result


def job(contender: Contender, settings: Settings, tokens: Sequence[int]) -> BenchJob:
    """What the child is asked."""
    return BenchJob(
        opening=contender.opening,
        tokens=tuple(tokens),
        prompts=settings.prompts,
        generate=settings.generate,
        passes=settings.passes,
        far_prompt=settings.far_prompt,
        far_generate=settings.far_generate,
    )


def sample_of(name: str, repetition: int, position: int, load: float, ended: Ended) -> Sample:
    """How a child ended, as a sample."""
    passed = ended.outcome is Outcome.PASS
    return Sample(
        contender=name,
        repetition=repetition,
        position=position,
        load_average_1min=round(load, 2),
        outcome=ended.outcome,
        detail=ended.detail,
        timing=Timing.model_validate(ended.result) if passed else None,
    )


def line(sample: Sample) -> str:
    """A sample in a few words."""
    if sample.timing is None:
        return f"{sample.contender:<18} {sample.outcome.value}: {sample.detail}"
    prefill = ", ".join(f"{sample.timing.prefill_tps(n):.0f}" for n in sorted(sample.timing.prompts))
    far = f", at a long context {sample.timing.far_decode_tps:.1f}" if sample.timing.far else ""
    return f"{sample.contender:<18} decode {sample.timing.decode_tps:6.1f}{far} tok/s, prefill {prefill} tok/s"
