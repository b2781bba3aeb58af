"""Decoding far into a context: `python -m runtime_tests.bench.depths MODEL QUANT --source … [--write]`.

Every kind of KV cache of ours beside llama.cpp's of the same weights, in turns in one run. A step's time depends on how
many tokens the cache holds, not on which: caches are filled with any numbers instead of hours of prompts.
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

import devices
from export import formats, manifest
from export.architecture import Strict
from export.build.command import run as run_app
from export.host.console import console, say
from export.manifest import ROOT, Commit
from export.plan import Target, load_named, load_plan
from export.toolbox.tables import NONE, Row, plain
from runtime_tests.evidence import record
from runtime_tests.evidence.record import Environment, Outcome
from runtime_tests.jobs import DepthsJob, Opening, isolation
from runtime_tests.places import environment
from runtime_tests.reports import templates

from . import contenders, exports, forms, publish
from .contenders import SESSION
from .measurement import rotated
from .results import Spread, ratio, spread

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_LIMIT_S = 900.0
_SLACK = 256
"""Slots behind the last position; llama.cpp makes contexts of multiples of this."""
_RUNNERS = {"executorch-xnnpack": "device_runner", "onnx-cpu": SESSION}
"""Target → the runner that is fastest there."""
_LLAMA_CPP = {
    f"{kind}, {'with' if flash else 'without'} flash attention": (kind, flash)
    for kind in ("f16", "q8_0")
    for flash in (True, False)
}


class Steps(Strict):
    """What one process measured; nanoseconds."""

    prompt: tuple[int, int]
    """Tokens, nanoseconds."""
    steps: dict[int, tuple[int, ...]]
    """Of single tokens, by the number of tokens before the first."""
    peak_rss_bytes: int

    def step_ns(self, position: int) -> float:
        """Of one token there."""
        return median(self.steps[position])


class Contender(Strict):
    """A file with a kind of cache."""

    name: str
    ours: bool
    target: str
    """Whose int8 and float32 are compared; of llama.cpp's, its name."""
    cache: str
    opening: Opening


class Sample(Strict):
    """One contender in one repetition."""

    contender: str
    repetition: int
    outcome: Outcome
    detail: str
    timing: Steps | None


class Depths(Strict):
    """One run."""

    model: str
    quant: str
    command: str
    checkpoint: str
    commit: Commit
    environment: Environment
    threads: int
    positions: tuple[int, ...]
    generate: int
    contenders: tuple[Contender, ...]
    samples: tuple[Sample, ...]
    missing: dict[str, str]

    def values(self, name: str, metric: Callable[[Steps], float]) -> dict[int, float]:
        """Repetition → value, of those that ran."""
        return {s.repetition: metric(s.timing) for s in self.samples if s.contender == name and s.timing}

    def named(self, **wanted: str | bool) -> list[str]:
        """Contenders with these fields."""
        return [c.name for c in self.contenders if wanted.items() <= c.model_dump().items()]

    def best(self, position: int, *, ours: bool) -> dict[int, float]:
        """Repetition → tokens per second of the fastest of a side there."""
        sides = [self.values(name, rate(position)) for name in self.named(ours=ours)]
        return {i: max(side[i] for side in sides if i in side) for i in set().union(*sides)}


@app.command()
def main(  # noqa: PLR0913, PLR0917 – a command's options
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    quant: Annotated[str, typer.Argument(help="a name in configs/quant, int4 groupwise")],
    source: Annotated[str | None, typer.Option(help="where the weights come from")] = None,
    positions: Annotated[str, typer.Option(help="tokens in the cache")] = "64,2048,8192,16384",
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    generate: Annotated[int, typer.Option(min=1, help="tokens timed at a position")] = 12,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of the prompt that is timed")] = 512,
    threads: Annotated[int | None, typer.Option(min=1, help="default: all fast cores")] = None,
    write: Annotated[bool, typer.Option(help="write docs/benchmarks/far-MODEL.md")] = False,
) -> None:
    """Time single tokens at several positions; exit 1 if a contender does not run."""
    count, places = threads or environment.threads(devices.load("host")), tuple(sorted(map(int, positions.split(","))))
    ready, missing = _gather(model, quant, source, max(*places, prompt) + _SLACK, count)
    turns = [(contender, i) for i in range(repetitions) for contender in rotated(ready, i)]
    samples = [_sample(contender, i, prompt, places, generate) for contender, i in turns]
    run = Depths(
        model=model,
        quant=quant,
        command=shlex.join(["python", "-m", "runtime_tests.bench.depths", *sys.argv[1:]]),
        checkpoint=manifest.read(Path(ready[0].opening.path).parent).checkpoint.description,
        commit=manifest.source_info().commit,
        environment=environment.current(),
        threads=count,
        positions=places,
        generate=generate,
        contenders=tuple(ready),
        samples=tuple(samples),
        missing=missing,
    )
    record.append(run, ROOT / exports.BENCH / "depths.jsonl")
    for table in (measured(run), compared(run)):
        say("", *plain(table))
    if write:
        path = publish.DOCS / publish.FOLDER / f"far-{model}.md"
        say(f"written: {publish.write(path, page(run)).relative_to(ROOT)}")
    if any(sample.timing is None for sample in samples):
        raise typer.Exit(1)


def _gather(
    model: str, quant: str, source: str | None, context: int, threads: int
) -> tuple[list[Contender], dict[str, str]]:
    """What is missing is built; llama.cpp may be left out, with the reason."""
    ready: list[Contender] = []
    folder = Path()
    for target, runner in _RUNNERS.items():
        for cache in formats.load(load_named(Target, "targets", target).backend).CACHES:
            folder = exports.built(load_plan(model, quant, target, context, cache=cache), source)
            described = manifest.read(ROOT / folder)
            file = folder if runner == SESSION else folder / described.plan.target.artifact
            opening = contenders.opening(runner, file, folder, threads)
            name = f"our {Path(described.plan.target.artifact).suffix}, {cache}"
            ready.append(Contender(name=name, ours=True, target=target, cache=cache, opening=opening))
    try:
        made = Path(exports.make("llamacpp-q4_0", folder, source).folder)
    except exports.NotMadeError as error:
        return ready, {"llama.cpp": str(error)}
    opened = contenders.opening("llamacpp", made / forms.GGUF, folder, threads)
    for name, (kind, flash) in _LLAMA_CPP.items():
        opening = opened.model_copy(update={"kv": kind, "flash_attention": flash})
        ready.append(Contender(name=f"llama.cpp Q4_0, {name}", ours=False, target="", cache=kind, opening=opening))
    return ready, {}


def _sample(contender: Contender, repetition: int, prompt: int, positions: tuple[int, ...], generate: int) -> Sample:
    job = DepthsJob(opening=contender.opening, prompt=prompt, positions=positions, generate=generate)
    ended = isolation.run(job, limit_s=_LIMIT_S)
    timing = Steps.model_validate(ended.result) if ended.outcome is Outcome.PASS else None
    rates = [f"{rate(position)(timing):.1f}" for position in positions] if timing else [ended.detail]
    console.print(f"  {repetition + 1} {contender.name}: {', '.join(rates)}", soft_wrap=True)
    return Sample(
        contender=contender.name, repetition=repetition, outcome=ended.outcome, detail=ended.detail, timing=timing
    )


def rate(position: int) -> Callable[[Steps], float]:
    """Tokens per second there."""
    return lambda timing: 1e9 / timing.step_ns(position)


def prompt_rate(timing: Steps) -> float:
    """Prompt tokens per second."""
    tokens, ns = timing.prompt
    return tokens * 1e9 / ns


def measured(run: Depths) -> list[Row]:
    """A row per contender: tokens per second at each position and of the prompt, memory."""
    tokens = next((s.timing.prompt[0] for s in run.samples if s.timing), 0)
    header: Row = ("tokens per second", *(f"at {n:,}" for n in run.positions), f"prompt of {tokens}", "peak RSS MB")
    rows: list[Row] = [header]
    for contender in run.contenders:
        cells = [_text(spread(run.values(contender.name, rate(n)).values()), 1) for n in run.positions]
        memory = run.values(contender.name, lambda timing: timing.peak_rss_bytes / 1e6).values()
        prompt = _text(spread(run.values(contender.name, prompt_rate).values()), 0)
        rows.append((contender.name, *cells, prompt, f"{max(memory):.0f}" if memory else NONE))
    return rows


def compared(run: Depths) -> list[Row]:
    """Ratios at each position, and of the prompt: medians of each repetition's, with their quartiles."""
    near = run.positions[0]
    rows: list[Row] = [("ratio", *(f"at {n:,}" for n in run.positions), "prompt")]

    def add(label: str, cells: Iterator[Spread | None], prompt: Spread | None = None) -> None:
        rows.append((label, *(_text(cell, 2) for cell in cells), _text(prompt, 2)))

    add(
        "our fastest / llama.cpp's fastest",
        (ratio(run.best(n, ours=True), run.best(n, ours=False)) for n in run.positions),
    )
    add(
        f"our fastest / itself at {near}",
        (ratio(run.best(n, ours=True), run.best(near, ours=True)) for n in run.positions),
    )
    add(
        f"llama.cpp's fastest / itself at {near}",
        (ratio(run.best(n, ours=False), run.best(near, ours=False)) for n in run.positions),
    )
    for contender in run.contenders:
        (base, *_) = run.named(target=contender.target, ours=True, cache="float32") or [contender.name]
        if contender.name == base:
            continue
        mine, theirs = _pairs(run, contender.name, base)
        add(
            f"{contender.name} / float32",
            (ratio(mine(rate(n)), theirs(rate(n))) for n in run.positions),
            ratio(mine(prompt_rate), theirs(prompt_rate)),
        )
        add(
            f"attention of {contender.name}: float32's time / its own",
            (ratio(theirs(_beyond(near, n)), mine(_beyond(near, n))) if n > near else None for n in run.positions),
        )
    return rows


def page(run: Depths) -> str:
    """The run as markdown."""
    return templates.render(publish.TEMPLATES / "far.md.j2", run=run, measured=measured(run), compared=compared(run))


_Values = Callable[[Callable[[Steps], float]], Mapping[int, float]]


def _pairs(run: Depths, one: str, other: str) -> tuple[_Values, _Values]:
    return lambda metric: run.values(one, metric), lambda metric: run.values(other, metric)


def _beyond(near: int, position: int) -> Callable[[Steps], float]:
    """Nanoseconds by which a step there takes longer: what attention adds. At least one."""
    return lambda timing: max(1.0, timing.step_ns(position) - timing.step_ns(near))


def _text(values: Spread | None, digits: int) -> str:
    return values.text(digits) if values else NONE


if __name__ == "__main__":
    sys.exit(run_app(app))
