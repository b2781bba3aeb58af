"""python -m export MODEL QUANT TARGET [--source DIR_OR_HF_ID] [--out DIR]."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli import run
from .progress import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    quant: Annotated[str, typer.Argument(help="a name in configs/quant")],
    target: Annotated[str, typer.Argument(help="a name in configs/targets")],
    source: Annotated[str | None, typer.Option(help="folder, .gguf file or hub id the weights come from")] = None,
    out: Annotated[Path | None, typer.Option(help="the finished folder; default build/MODEL_QUANT_TARGET")] = None,
) -> None:
    """Build one artifact folder: quantize once, lower, describe."""
    from .plan import load_plan

    plan = load_plan(model, quant, target)
    from .pipeline import export

    folder = out or Path("build") / plan.id
    console.print(f"[bold]{plan.id}[/bold]")
    built = export(plan, source, folder)
    print(
        f"{folder}: {plan.target.artifact} {built.artifact_bytes / 1e6:.1f} MB, "
        f"{built.quantization.bits_per_weight:.2f} bits per weight"
    )


if __name__ == "__main__":
    sys.exit(run(app))
