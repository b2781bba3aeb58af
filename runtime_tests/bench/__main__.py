"""Ours against stock: `python -m runtime_tests.bench [MODEL] [QUANT] [--write] [--export] …`.

Exit 0 whatever is faster, 1 if a contender fails to run. Raw samples go to build/bench/results.jsonl.
"""

import os
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

import devices
from export import manifest
from export.cli import run as run_app
from export.errors import ExportError
from export.manifest import ROOT
from export.progress import console

from .. import environment
from . import contenders, export_cost, fidelity, page, results, rounds, tables
from .contenders import Field
from .results import Benchmark, ExportCost, Settings
from .roles import ROLES
from .stock import BENCH

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
RESULTS = ROOT / BENCH / "results.jsonl"
PAGE = ROOT / "docs" / "benchmarks.md"
ALL = ",".join(role.name for role in ROLES)


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    model: str
    quant: str
    source: str | None
    eval_name: str
    accuracy: bool
    export: bool


@app.command()
def main(  # noqa: PLR0913, PLR0917 – a command's options
    model: Annotated[str, typer.Argument(help="a name in configs/models")] = "smollm2-135m",
    quant: Annotated[str, typer.Argument(help="a name in configs/quant, int4 groupwise")] = "int4-g32",
    source: Annotated[str | None, typer.Option(help="where the weights come from")] = None,
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    prompts: Annotated[str, typer.Option(help="prompt lengths, tokens")] = "42,512",
    generate: Annotated[int, typer.Option(min=1, help="generated tokens")] = 128,
    passes: Annotated[int, typer.Option(min=1, help="timed passes in each process")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="default: physical cores")] = None,
    only: Annotated[str, typer.Option(help="contenders, by name")] = ALL,
    eval_name: Annotated[str, typer.Option("--eval", help="a name in configs/evals")] = "default",
    accuracy: Annotated[bool, typer.Option(help="compare logits with fp32")] = True,
    export: Annotated[bool, typer.Option(help="time our exports, cold")] = False,
    write: Annotated[bool, typer.Option(help="write docs/benchmarks.md")] = False,
) -> None:
    """Measure our artifacts against the stock ones of the same weights, interleaved, in one run."""
    request = Request(model, quant, source, eval_name, accuracy, export)
    count = threads or devices.thread_count(devices.load("host"))
    field = contenders.gather(model, quant, source, count, chosen(only))
    settings = Settings(
        threads=count,
        context=field.contenders[0].opening.context,
        prompts=lengths(prompts),
        generate=generate,
        passes=passes,
        repetitions=repetitions,
    )
    benchmark = perform(request, field, settings)
    results.append(benchmark, RESULTS)
    show(benchmark)
    if write:
        write_page(benchmark, field, eval_name)
    if benchmark.failures:
        raise typer.Exit(1)


def chosen(only: str) -> tuple[str, ...]:
    """Names of contenders; unknown ones are refused."""
    names = tuple(name.strip() for name in only.split(","))
    if unknown := sorted(set(names) - set(ALL.split(","))):
        raise ExportError(f"--only: unknown {', '.join(unknown)}; known: {ALL}")
    return names


def lengths(prompts: str) -> tuple[int, ...]:
    """`42,512` → (42, 512), shortest first."""
    try:
        found = sorted({int(part) for part in prompts.split(",")})
    except ValueError:
        raise ExportError(f"--prompts {prompts}: expected lengths like 42,512") from None
    if found[0] < 1:
        raise ExportError(f"--prompts {prompts}: lengths begin at 1")
    return tuple(found)


def perform(request: Request, field: Field, settings: Settings) -> Benchmark:
    """Accuracy, exports and the interleaved timing, as one record."""
    started, began, machine = datetime.now(UTC), time.perf_counter(), environment.current()
    source_info = manifest.source_info()
    folder = ROOT / next(iter(field.ours.values()))
    cut = fidelity.windows(folder, request.eval_name)
    tokens = prompt_tokens(cut.tokens.ravel().tolist(), settings)
    judged = fidelity.judge(field.contenders, folder, request.source, cut) if request.accuracy else []
    costs = export_costs(request, field)
    console.print(f"timing {len(field.contenders)} contenders, {settings.repetitions} repetitions", soft_wrap=True)
    samples = tuple(rounds.measure(field.contenders, settings, tokens))
    return Benchmark(
        schema_version=1,
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
        settings=settings,
        entries=tuple(contender.entry for contender in field.contenders),
        missing=field.missing,
        samples=samples,
        fidelity=tuple(judged),
        exports=tuple(costs),
    )


def prompt_tokens(text: list[int], settings: Settings) -> list[int]:
    """Real text for the longest prompt, repeated if the evaluation is shorter."""
    longest = settings.prompts[-1]
    if longest + settings.generate > settings.context:
        raise ExportError(f"{longest} + {settings.generate} tokens do not fit a context of {settings.context}")
    return (text * (longest // len(text) + 1))[:longest]


def export_costs(request: Request, field: Field) -> list[ExportCost]:
    """The stock exporters as noted; ours only when asked, for it takes minutes."""
    found = export_cost.stock(field.made)
    return [*export_cost.ours(request.model, request.quant, request.source), *found] if request.export else found


def show(benchmark: Benchmark) -> None:
    """The run in the terminal."""
    for rows in (tables.measured(benchmark), tables.compared(benchmark), tables.exports(benchmark)):
        print("\n" + tables.plain(rows))
    print(f"\nsamples: {RESULTS.relative_to(ROOT)}, run {benchmark.run_id}")
    for name, why in benchmark.missing.items():
        print(f"not in the run: {name}: {why}")
    for line in benchmark.failures:
        print(f"failed: {line}")


def write_page(benchmark: Benchmark, field: Field, eval_name: str) -> None:
    """docs/benchmarks.md, whole or not at all."""
    described = manifest.read(ROOT / next(iter(field.ours.values())))
    text = page.render(
        benchmark, evaluation=eval_name, checkpoint=f"the checkpoint is {described.checkpoint.description}"
    )
    PAGE.parent.mkdir(exist_ok=True)
    part = PAGE.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    Path.replace(part, PAGE)
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(run_app(app))
