"""Ours against stock: `python -m runtime_tests.bench [MODEL] [QUANT] [--write] [--export] …`.

Exit code 1 if a contender fails to run, 0 otherwise, whichever is faster. Raw samples go to build/bench/results.jsonl.
"""

import sys
from typing import Annotated

import typer

import devices
from export.build.command import run as run_app
from export.errors import ExportError
from export.host.console import say
from export.manifest import ROOT
from export.toolbox.tables import plain
from runtime_tests.evidence import record
from runtime_tests.places import environment

from . import contenders, fidelity, measurement, publish, tables
from .contenders import ROLES, Request
from .exports import BENCH
from .publish import DOCS
from .results import Benchmark, Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_RESULTS = ROOT / BENCH / "results.jsonl"
_ALL = ",".join(role.name for role in ROLES)


@app.command()
def main(  # noqa: PLR0913, PLR0917 – a command's options
    model: Annotated[str, typer.Argument(help="a name in configs/models")] = "smollm2-135m",
    quant: Annotated[str, typer.Argument(help="a name in configs/quant, int4 groupwise")] = "int4-g32",
    source: Annotated[str | None, typer.Option(help="where the weights come from")] = None,
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    prompts: Annotated[str, typer.Option(help="prompt lengths, tokens")] = "42,512",
    generate: Annotated[int, typer.Option(min=1, help="generated tokens")] = 128,
    passes: Annotated[int, typer.Option(min=1, help="timed passes in each process")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="default: all fast cores")] = None,
    only: Annotated[str, typer.Option(help="contenders, by name")] = _ALL,
    also: Annotated[str, typer.Option(help="further recipes of ours, measured beside QUANT")] = "",
    eval_name: Annotated[str, typer.Option("--eval", help="a name in configs/evals")] = "default",
    accuracy: Annotated[bool, typer.Option(help="compare logits with fp32")] = True,
    long_context: Annotated[bool, typer.Option(help="time decoding at the end of the cache too")] = True,
    export: Annotated[bool, typer.Option(help="time our exports, cold")] = False,
    write: Annotated[bool, typer.Option(help="write the model's page in docs/benchmarks")] = False,
) -> None:
    """Measure our artifacts against the stock ones of the same weights, interleaved, in one run."""
    count = threads or environment.threads(devices.load("host"))
    further = tuple(name.strip() for name in also.split(",") if name.strip())
    if accuracy:
        fidelity.refuse_read_text(eval_name, (quant, *further))
    request = Request(model, quant, source, count, chosen(only), further, eval_name, accuracy, export)
    lineup = contenders.gather(request)
    context = lineup.contenders[0].opening.context
    settings = Settings(
        threads=count,
        context=context,
        prompts=lengths(prompts),
        generate=generate,
        passes=passes,
        repetitions=repetitions,
        far_prompt=context - measurement.FAR_ROOM if long_context else 0,
        far_generate=measurement.FAR_GENERATE if long_context else 0,
    )
    benchmark = measurement.perform(request, lineup, settings)
    record.append(benchmark, _RESULTS)
    _show(benchmark)
    if write:
        for path in publish.publish(benchmark, DOCS):
            say(f"written: {path.relative_to(ROOT)}")
    if benchmark.failures:
        raise typer.Exit(1)


def chosen(only: str) -> tuple[str, ...]:
    """Names of contenders; unknown ones are refused."""
    names = tuple(name.strip() for name in only.split(","))
    if unknown := sorted(set(names) - set(_ALL.split(","))):
        raise ExportError(f"--only: unknown {', '.join(unknown)}; known: {_ALL}")
    return names


def lengths(prompts: str) -> tuple[int, ...]:
    """`42,512` → (42, 512), shortest first."""
    try:
        parsed = sorted({int(part) for part in prompts.split(",")})
    except ValueError:
        raise ExportError(f"--prompts {prompts}: expected lengths like 42,512") from None
    if parsed[0] < 1:
        raise ExportError(f"--prompts {prompts}: lengths begin at 1")
    return tuple(parsed)


def _show(benchmark: Benchmark) -> None:
    """The run in the terminal."""
    for rows in filter(None, (table(benchmark) for table in tables.SHOWN)):
        say("", *plain(rows))
    say("", f"samples: {_RESULTS.relative_to(ROOT)}, run {benchmark.run_id}")
    for name, reason in benchmark.missing.items():
        say(f"not in the run: {name}: {reason}")
    for line in benchmark.failures:
        say(f"failed: {line}")


if __name__ == "__main__":
    sys.exit(run_app(app))
