"""The interleaved measurement: every repetition runs each contender once, in a new process, in rotating order."""

import os
from collections.abc import Iterator, Sequence

from export.progress import console

from .. import isolation
from ..isolation import Ended
from ..jobs import BenchJob
from ..record import Outcome
from .contenders import Contender
from .ratios import rotated
from .results import Sample, Settings, Timing

LIMIT_S = 900.0
"""Longest one contender may take in one repetition."""


def measure(contenders: Sequence[Contender], settings: Settings, tokens: Sequence[int]) -> Iterator[Sample]:
    """Samples as they come, a line each; a contender that dies is a sample too, and the run goes on."""
    for repetition in range(settings.repetitions):
        for position, contender in enumerate(rotated(contenders, repetition)):
            load = os.getloadavg()[0]
            ended = isolation.run(job(contender, settings, tokens), limit_s=LIMIT_S)
            sample = sample_of(contender.entry.name, repetition, position, load, ended)
            console.print(f"  {repetition + 1}/{settings.repetitions} {line(sample)}", soft_wrap=True, markup=False)
            yield sample


def job(contender: Contender, settings: Settings, tokens: Sequence[int]) -> BenchJob:
    """What the child is asked."""
    return BenchJob(
        opening=contender.opening,
        tokens=tuple(tokens),
        prompts=settings.prompts,
        generate=settings.generate,
        passes=settings.passes,
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
    return f"{sample.contender:<18} decode {sample.timing.decode_tps:6.1f} tok/s, prefill {prefill} tok/s"
