"""A benchmark from beginning to end as one record: accuracy, exports, overheads, the interleaved timing."""

import os
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from export import manifest
from export.errors import ExportError
from export.manifest import ROOT
from export.progress import console

from .. import environment
from . import export_cost, fidelity, rounds
from .contenders import Field
from .results import Benchmark, ExportCost, HostOverhead, Sample, Settings

FAR_ROOM = 128
"""Slots left behind the long prompt."""
FAR_GENERATE = 64


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    model: str
    quant: str
    source: str | None
    eval_name: str
    accuracy: bool
    export: bool


def perform(request: Request, field: Field, settings: Settings) -> Benchmark:
    """Everything that was asked, measured."""
    started, began, machine = datetime.now(UTC), time.perf_counter(), environment.current()
    source_info = manifest.source_info()
    folder = ROOT / next(iter(field.ours.values()))
    cut = fidelity.windows(folder, request.eval_name)
    tokens = prompt_tokens(cut.tokens.ravel().tolist(), settings)
    judged = fidelity.judge(field.contenders, folder, request.source, cut) if request.accuracy else []
    costs = export_costs(request, field)
    found_overheads = overheads(field, settings, tokens)
    samples, bandwidths = timed(field, settings, tokens)
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
        entries=tuple(contender.entry for contender in field.contenders),
        missing=field.missing,
        samples=tuple(samples),
        read_bandwidth_bytes_per_s=tuple(bandwidths),
        overheads=tuple(found_overheads),
        fidelity=tuple(judged),
        exports=tuple(costs),
    )


def timed(field: Field, settings: Settings, tokens: list[int]) -> tuple[list[Sample], list[float]]:
    """Every repetition: the machine's bandwidth, then every contender."""
    console.print(f"timing {len(field.contenders)} contenders, {settings.repetitions} repetitions", soft_wrap=True)
    samples: list[Sample] = []
    bandwidths = []
    for repetition in range(settings.repetitions):
        bandwidths.append(rounds.read_bandwidth(settings.threads))
        samples += rounds.measure(field.contenders, settings, tokens, repetition)
    return samples, bandwidths


def overheads(field: Field, settings: Settings, tokens: list[int]) -> list[HostOverhead]:
    """Of the sessions of all our artifacts that take part."""
    return [rounds.overhead(target, ROOT / folder, settings, tokens) for target, folder in field.ours.items()]


def prompt_tokens(text: list[int], settings: Settings) -> list[int]:
    """Real text for the longest prompt, repeated if the evaluation is shorter."""
    ends = (settings.prompts[-1] + settings.generate, settings.far_prompt + settings.far_generate)
    if max(ends) > settings.context:
        raise ExportError(
            f"{max(ends)} tokens, a prompt and what follows it, do not fit a context of {settings.context}"
        )
    longest = max(settings.prompts[-1], settings.far_prompt)
    return (text * (longest // len(text) + 1))[:longest]


def export_costs(request: Request, field: Field) -> list[ExportCost]:
    """The stock exporters as noted; ours only when asked, for it takes minutes."""
    found = export_cost.stock(field.made)
    return [*export_cost.ours(request.model, request.quant, request.source), *found] if request.export else found
