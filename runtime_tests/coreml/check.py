"""python -m runtime_tests.coreml.check [MODEL]: Core ML on this Mac beside the evaluator, as one command and one page.

`make mac-check` builds the tiny model and MODEL with fused and with plain attention, calls each package on each compute
unit in the shapes and states that clients use, and compares every answer with the evaluator's. Exit code 0 only if all
holds for what is shipped: the target's attention on the units of devices/host.yaml.
`LLAMA_COREML=reference` puts the evaluator in Core ML's place, to try the command itself without one.
"""

import os
import platform
import sys
import tempfile
from html import unescape
from pathlib import Path
from typing import Annotated, get_args

import typer

import devices
from export.build import request
from export.build.command import run
from export.checkpoints.origin import Origin
from export.errors import ExportError
from export.host import disk
from export.host.console import say, stage
from export.manifest import Manifest
from export.plan import Attention, Plan, Target, load_named
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import CoreMLJob, CoreMLPlanJob, isolation
from runtime_tests.jobs.isolation import Ended
from runtime_tests.places import environment
from runtime_tests.sessions import mlpackage

from . import calls, findings
from .findings import Run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_TARGET = "coreml"
_LIMIT_S = 1800.0


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="beside tiny, a name in configs/models")] = "smollm2-135m",
    quant: Annotated[str, typer.Option(help="a name in configs/quant")] = "int4-g32",
    source: Annotated[str | None, typer.Option(help="where the weights of MODEL are")] = None,
    adapter: Annotated[Path | None, typer.Option(help="merged into them")] = None,
    steps: Annotated[int, typer.Option(min=1, max=calls.CONTEXT - sum(calls.LENGTHS), help="single tokens")] = 300,
    out: Annotated[Path, typer.Option(help="folder of index.md")] = Path("build/mac-check"),
) -> None:
    """Compare Core ML on every compute unit of this Mac with the evaluator."""
    if not mlpackage.in_core_ml() and os.environ.get("LLAMA_COREML") != "reference":
        raise ExportError(
            f"mac-check runs Core ML and needs macOS 15 or later; this is {platform.platform(terse=True)}"
        )
    units = devices.load("host").compute_units
    shipped = (load_named(Target, "targets", _TARGET).attention, units)
    asked = [request.asked(model, quant, [_TARGET], source=source, adapter=adapter, context=calls.CONTEXT)]
    if model != "tiny":
        asked.insert(0, request.asked("tiny", quant, [_TARGET], context=calls.CONTEXT))
    out.mkdir(parents=True, exist_ok=True)
    with disk.writing(out):
        found = [(plan.name, *_measured(plan, origin, steps, out)) for (plan,), origin in asked]
        text, holds = findings.page(environment.current(units), shipped, found)
        (out / "index.md").write_text(text, encoding="utf-8")
    say(*unescape(text).splitlines(), "", f"page: {out / 'index.md'}")
    if not holds:
        raise typer.Exit(1)


def _measured(plan: Plan, origin: Origin | None, steps: int, out: Path) -> tuple[Manifest, list[Run]]:
    """Build a model with each attention and call it on all units; the evaluator's answers to the fused one judge.

    Raises ExportError: the evaluator itself does not answer.
    """
    from export import pipeline  # loads torch

    folders: dict[Attention, Path] = {attention: out / f"{plan.name}-{attention}" for attention in get_args(Attention)}
    for attention, folder in folders.items():
        target = plan.target.model_copy(update={"attention": attention})
        described = pipeline.export(plan.model_copy(update={"target": target}), origin, folder)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        reference = str(Path(scratch).resolve() / "reference.npz")
        if (ended := _called(folders["fused"], None, steps, reference)).outcome is not Outcome.PASS:
            raise ExportError(f"{folders['fused']}: not evaluated: {ended.detail}")
        here = mlpackage.in_core_ml()
        chosen = get_args(devices.ComputeUnits) if here else (devices.load("host").compute_units,)
        runs = [
            Run(attention, units, _called(folder, units, steps, reference), _planned(folder, plan, units))
            for attention, folder in folders.items()
            for units in chosen
        ]
    return described, runs


def _called(folder: Path, units: str | None, steps: int, reference: str) -> Ended:
    """The calls in a child process, which may crash; the evaluator's become the reference."""
    job = CoreMLJob(
        folder=str(folder.resolve()),
        compute_units=units,
        threads=environment.threads(),
        steps=steps,
        reference=reference,
    )
    with stage(units or "evaluator", folder.name):
        return isolation.run(job, limit_s=_LIMIT_S)


def _planned(folder: Path, plan: Plan, units: str) -> Ended | None:
    if not mlpackage.in_core_ml():
        return None
    job = CoreMLPlanJob(package=str((folder / plan.target.artifact).resolve()), compute_units=units)
    return isolation.run(job, limit_s=_LIMIT_S)


if __name__ == "__main__":
    sys.exit(run(app))
