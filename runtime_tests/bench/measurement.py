"""A benchmark from beginning to end, as one record: accuracy, exports, overheads, the interleaved timing.

Every repetition runs each contender once, in a new process, in rotating order.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from export import manifest
from export.errors import ExportError
from export.host.console import console
from export.manifest import ROOT
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import BandwidthJob, BenchJob, OverheadJob, isolation
from runtime_tests.jobs.isolation import Ended
from runtime_tests.places import environment

from . import exports, fidelity
from .contenders import Contender, Lineup, Request
from .results import Benchmark, HostOverhead, Sample, Settings, Timing

Item = TypeVar("Item")
_LIMIT_S = 900.0
"""Longest one contender may take in one repetition."""
FAR_ROOM = 128
"""Slots left behind the long prompt."""
FAR_GENERATE = 64


def perform(request: Request, lineup: Lineup, settings: Settings) -> Benchmark:
    """Measure everything that the request names."""
    started, began, machine = datetime.now(UTC), time.perf_counter(), environment.current()
    source_info = manifest.source_info()
    folder = ROOT / next(iter(lineup.ours.values()))
    cut = fidelity.windows(folder, request.eval_name)
    tokens = prompt_tokens(cut.tokens.ravel().tolist(), settings)
    openings = {contender.entry.name: contender.opening for contender in lineup.contenders}
    judged = fidelity.judge(openings, folder, request.source, cut) if request.accuracy else ()
    costs = exports.stock(lineup.made)
    if request.export:
        costs = [*exports.ours(request.model, request.quant, request.source), *costs]
    overheads = [_overhead(target, ROOT / ours, settings, tokens) for target, ours in lineup.ours.items()]
    samples, bandwidths = _interleaved(lineup.contenders, settings, tokens)
    return Benchmark(
        schema_version=3,
        run_id=started.strftime("%Y%m%d-%H%M%S"),
        command=shlex.join(["python", "-m", "runtime_tests.bench", *sys.argv[1:]]),
        model=request.model,
        quant=request.quant,
        started_at=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - began,
        commit=source_info.commit,
        dirty=source_info.dirty,
        environment=machine,
        load_average_after=round(os.getloadavg()[0], 2),
        evaluation=request.eval_name,
        checkpoint=manifest.read(folder).checkpoint.description,
        settings=settings,
        entries=tuple(contender.entry for contender in lineup.contenders),
        missing=lineup.missing,
        samples=tuple(samples),
        read_bandwidth_bytes_per_s=tuple(bandwidths),
        overheads=tuple(overheads),
        fidelity=tuple(judged),
        exports=tuple(costs),
    )


def _interleaved(
    contenders: Sequence[Contender], settings: Settings, tokens: Sequence[int]
) -> tuple[list[Sample], list[float]]:
    """In every repetition the machine's read bandwidth in bytes per second, then every contender."""
    console.print(f"timing {len(contenders)} contenders, {settings.repetitions} repetitions", soft_wrap=True)
    samples: list[Sample] = []
    bandwidths = []
    for repetition in range(settings.repetitions):
        ended = isolation.run(BandwidthJob(threads=settings.threads), limit_s=_LIMIT_S)
        bandwidths.append(float(_required(ended, "memory bandwidth")["bytes_per_s"]))
        samples += measure(contenders, settings, tokens, repetition)
    return samples, bandwidths


def prompt_tokens(text: list[int], settings: Settings) -> list[int]:
    """Tokens of the longest prompt: the evaluation's text, repeated where it is shorter. Raises ExportError."""
    ends = (settings.prompts[-1] + settings.generate, settings.far_prompt + settings.far_generate)
    if max(ends) > settings.context:
        raise ExportError(
            f"{max(ends)} tokens, a prompt and what follows it, do not fit a context of {settings.context}"
        )
    longest = max(settings.prompts[-1], settings.far_prompt)
    return (text * (longest // len(text) + 1))[:longest]


def measure(
    contenders: Sequence[Contender], settings: Settings, tokens: Sequence[int], repetition: int
) -> Iterator[Sample]:
    """One repetition: each sample is printed and yielded when it is there; a contender that crashes gives one too."""
    lengths = settings.model_dump(include=set(BenchJob.model_fields))
    for position, contender in enumerate(rotated(contenders, repetition)):
        load = os.getloadavg()[0]
        job = BenchJob(opening=contender.opening, tokens=tuple(tokens), **lengths)
        ended = isolation.run(job, limit_s=_LIMIT_S)
        sample = Sample(
            contender=contender.entry.name,
            repetition=repetition,
            position=position,
            load_average_1min=round(load, 2),
            outcome=ended.outcome,
            detail=ended.detail,
            timing=Timing.model_validate(ended.result) if ended.outcome is Outcome.PASS else None,
        )
        console.print(f"  {repetition + 1}/{settings.repetitions} {_line(sample)}", soft_wrap=True)
        yield sample


def _overhead(label: str, folder: Path, settings: Settings, tokens: Sequence[int]) -> HostOverhead:
    prompt = tuple(tokens[: settings.prompts[0]])
    job = OverheadJob(folder=str(folder), threads=settings.threads, prompt=prompt, generate=settings.generate)
    return HostOverhead.model_validate({"label": label} | _required(isolation.run(job, limit_s=_LIMIT_S), label))


def _required(ended: Ended, subject: str) -> dict[str, Any]:
    """The result of a job without which there is no benchmark."""
    if ended.outcome is not Outcome.PASS:
        raise ExportError(f"{subject}: {ended.outcome.value}: {ended.detail}")
    return ended.result


def _line(sample: Sample) -> str:
    if sample.timing is None:
        return f"{sample.contender:<18} {sample.outcome.value}: {sample.detail}"
    prefill = ", ".join(f"{sample.timing.prefill_tps(n):.0f}" for n in sorted(sample.timing.prompts))
    far = f", at a long context {sample.timing.far_decode_tps():.1f}" if sample.timing.far else ""
    return f"{sample.contender:<18} decode {sample.timing.decode_tps():6.1f}{far} tok/s, prefill {prefill} tok/s"


def rotated(items: Sequence[Item], repetition: int) -> list[Item]:
    """The order of a repetition: A B C, B C A, C A B, … so that none always runs on a machine that is hot or cool."""
    start = repetition % len(items)
    return [*items[start:], *items[:start]]
