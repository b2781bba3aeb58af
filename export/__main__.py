"""python -m export MODEL QUANT TARGET… [--source …] [--adapter DIR] [--out DIR]; inspect, diff, verify, sign."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import commands, places, unchanged
from .cli import run
from .progress import console

if TYPE_CHECKING:  # importing is left until the arguments are right
    from .plan import Plan

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Finished artifacts: python -m export inspect PATH, diff A B, verify PATH, sign PATH (--help).")
def main(  # noqa: PLR0913, PLR0917 – a command's options
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    quant: Annotated[str, typer.Argument(help="a name in configs/quant")],
    target: Annotated[list[str], typer.Argument(help="names in configs/targets; several are built side by side")],
    source: Annotated[str | None, typer.Option(help="folder, .gguf file or hub id of the weights")] = None,
    adapter: Annotated[Path | None, typer.Option(help="folder of a LoRA adapter that is merged into it")] = None,
    out: Annotated[Path | None, typer.Option(help="the finished folder of one target")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="say why each artifact is built again")] = False,
) -> None:
    """Build build/MODEL_QUANT_TARGET, one artifact folder for each target: quantize once, lower, describe.

    A folder that holds what would be written again is left as it is.
    """
    from .plan import load_plan

    if len(target) > 1 and out:
        raise typer.BadParameter("names the folder of one target; leave it out or give one target", param_hint="--out")
    if len(set(target)) < len(target):
        raise typer.BadParameter("the same target twice", param_hint="TARGET")
    plans = [load_plan(model, quant, name) for name in target]
    if adapter:
        source = places.adapted(places.origin_of(plans[0].model, source), adapter)
    plans = [plan for plan in plans if is_stale(plan, source, out or Path("build") / plan.id, explain)]
    if not plans:
        return
    from . import cache, pipeline, together

    if len(plans) == 1:
        build_one(plans[0], source, out or Path("build") / plans[0].id)
    else:
        console.print(f"[bold]{model}_{quant}[/bold]")
        together.build(plans, source, Path("build"), pipeline.CACHE)
    cache.trim(pipeline.CACHE)


def is_stale(plan: "Plan", source: str | None, folder: Path, explain: bool) -> bool:
    """Whether a build would write something else than what is there; what is there is named."""
    why = unchanged.reasons(plan, source, folder)
    if not why:
        console.print(f"{folder}: up to date", soft_wrap=True)
    for reason in why if explain else []:
        console.print(f"{plan.id}: {reason}", soft_wrap=True)
    return bool(why)


def build_one(plan: "Plan", source: str | None, folder: Path) -> None:
    """Build here and say what was built."""
    from .pipeline import export

    console.print(f"[bold]{plan.id}[/bold]")
    built = export(plan, source, folder)
    print(
        f"{folder}: {plan.target.artifact} {built.artifact_bytes / 1e6:.1f} MB, "
        f"{built.quantization.bits_per_weight:.2f} bits per weight"
    )


if __name__ == "__main__":
    sys.exit(run(commands.app if sys.argv[1:2] and sys.argv[1] in commands.NAMES else app))
