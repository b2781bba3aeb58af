"""Build artifacts with `python -m export MODEL QUANT TARGET…`; look at finished ones with the other commands."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from export import build as build_artifact

from .build import skip
from .build.command import run, with_default
from .checkpoints.origin import chosen_origin
from .host import disk
from .host.console import console, say
from .plan import Device, load_plan
from .toolbox import commands

app = typer.Typer(cls=with_default("build"), help=__doc__, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(commands.app)


@app.command("build")
def main(  # noqa: PLR0913, PLR0917 – a command's options
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    quant: Annotated[str, typer.Argument(help="a name in configs/quant")],
    target: Annotated[list[str], typer.Argument(help="names in configs/targets; several are built side by side")],
    source: Annotated[str | None, typer.Option(help="folder, .gguf file or hub id of the weights")] = None,
    adapter: Annotated[Path | None, typer.Option(help="folder of a LoRA adapter that is merged into it")] = None,
    out: Annotated[Path | None, typer.Option(help="the finished folder of one target")] = None,
    device: Annotated[Device, typer.Option(help="where calibration computes; integers differ a little")] = "cpu",
    explain: Annotated[bool, typer.Option("--explain", help="say why each artifact is built again")] = False,
) -> None:
    """Build build/MODEL_QUANT_TARGET, one artifact folder for each target: quantize once, lower, describe.

    A folder that holds what would be written again is left as it is.
    """
    if len(target) > 1 and out:
        raise typer.BadParameter("names the folder of one target; leave it out or give one target", param_hint="--out")
    if len(set(target)) < len(target):
        raise typer.BadParameter("the same target twice", param_hint="TARGET")
    out = out and disk.expanded(out)
    plans = [load_plan(model, quant, name, device=device) for name in target]
    origin = chosen_origin(plans[0].model, source, adapter)
    stale = [plan for plan in plans if skip.is_stale(plan, origin, out or Path("build") / plan.id, explain)]
    if len(stale) == 1:
        folder = out or Path("build") / stale[0].id
        built = build_artifact(
            model, quant, stale[0].target.name, source=source, adapter=adapter, device=device, out=folder
        )
        say(
            f"{folder}: {built.plan.target.artifact} {built.artifact_bytes / 1e6:.1f} MB, "
            f"{built.quantization.bits_per_weight:.2f} bits per weight"
        )
    elif stale:
        from . import pipeline
        from .build import parallel

        console.print(f"{model}_{quant}", style="bold", soft_wrap=True)
        cache = disk.cache_folder(pipeline.CACHE)
        parallel.build(stale, origin, Path("build"), cache)
        disk.trim(cache)


if __name__ == "__main__":
    sys.exit(run(app))
