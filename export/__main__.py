"""Build artifacts with `python -m export MODEL RECIPE TARGET…`; look at finished ones with the other commands.

For example:

python -m export smollm2-135m int4-g32-gptq onnx-cpu

python -m export llama32-1b-instruct int4-mixed onnx-cpu coreml --source ~/my-fine-tune --name assistant

python -m export llama32-1b-instruct int4-mixed onnx-cpu --adapter runs/my-lora

python -m export inspect build/smollm2-135m_int4-g32-gptq_onnx-cpu
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from export import manifest

from .build import request, skip
from .build.command import Timings, run, with_default
from .checkpoints.origin import origin_of
from .errors import ExportError
from .host import disk, processes, processor
from .host.console import console, say
from .plan import Cache, Device
from .toolbox import commands

app = typer.Typer(cls=with_default("build"), help=__doc__, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(commands.app)

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="a name in configs/models: shapes, license, context")]
_Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="a name in configs/quant")]
_Targets = Annotated[
    list[str], typer.Argument(metavar="TARGET...", help="names in configs/targets; several are built side by side")
]
_Source = Annotated[str | None, typer.Option(help="folder, .gguf file or hub id of the weights")]
_Adapter = Annotated[
    Path | None, typer.Option(help="folder of a LoRA adapter that is merged into --source, or into the base it names")
]
_Name = Annotated[str | None, typer.Option(help="of the artifact; default: the adapter's or source's own, else MODEL")]
_Context = Annotated[int | None, typer.Option(help="tokens of the KV cache; default: the model's context_length")]
_Cache = Annotated[Cache | None, typer.Option(help="numbers of the KV cache; default: the target's own kind")]
_Policy = Annotated[
    str | None,
    typer.Option(help="tokens that stay in the KV cache: window-N the last N, sink-N the first N and the newest"),
]
_Out = Annotated[
    Path | None, typer.Option(help="the finished folder of one target; the folder that gets one for each of several")
]


@app.command("build")
def main(  # noqa: PLR0913, PLR0917 – a command's options
    model: _Model,
    quant: _Recipe,
    target: _Targets,
    source: _Source = None,
    adapter: _Adapter = None,
    name: _Name = None,
    context: _Context = None,
    cache: _Cache = None,
    policy: _Policy = None,
    out: _Out = None,
    device: Annotated[Device, typer.Option(help="where calibration computes; integers differ a little")] = "cpu",
    explain: Annotated[bool, typer.Option("--explain", help="say why each artifact is built again")] = False,
    timings: Timings = False,
) -> None:
    """Build build/NAME_RECIPE_TARGET, one artifact folder for each target: quantize once, lower, describe.

    A context or a kind of cache other than those of model and target, and a policy, end the folder's name:
    _8192_int8_window-1024.

    A folder that holds what would be written again is left as it is.

    Example: python -m export smollm2-135m int4-g32-gptq onnx-cpu coreml
    """
    if len(set(target)) < len(target):
        raise typer.BadParameter("the same target twice", param_hint="TARGET")
    plans, origin = request.asked(
        model,
        quant,
        target,
        source=source,
        adapter=adapter,
        name=name,
        context=context,
        cache=cache,
        policy=policy,
        device=device,
    )
    root, several = out and disk.expanded(out), len(plans) > 1
    if several and root and (root / manifest.FILE).is_file():
        raise ExportError(
            f"{root}: an artifact's folder; for several targets --out is the folder that gets one for each"
        )
    folders = {plan.target.name: request.place(plan, root, several) for plan in plans}
    stale = [plan for plan in plans if skip.is_stale(plan, origin, folders[plan.target.name], explain)]
    if not stale:
        return
    from . import pipeline

    kept = disk.cache_folder(pipeline.CACHE)
    if len(stale) == 1:
        (plan,) = stale
        folder = folders[plan.target.name]
        console.print(plan.id, style="bold", soft_wrap=True)
        built = pipeline.export(plan, origin, folder)
        say(
            f"{folder}: {built.plan.target.artifact} {built.artifact_bytes / 1e6:.1f} MB, "
            f"{built.quantization.bits_per_weight:.2f} bits per weight"
        )
    else:
        from .build import folder as artifact
        from .build import parallel

        for plan in stale:  # refused once, before any of them starts
            artifact.refuse_foreign(folders[plan.target.name], plan.id, origin_of(plan.model, origin))
        console.print(f"{stale[0].name}_{quant}", style="bold", soft_wrap=True)
        parallel.build(stale, origin, root or Path("build"), kept, ("--timings",) if timings else ())
    disk.trim(kept)


@app.command("folders")
def folders(  # noqa: PLR0913, PLR0917 – the options of a build
    model: _Model,
    quant: _Recipe,
    target: _Targets,
    source: _Source = None,
    adapter: _Adapter = None,
    name: _Name = None,
    context: _Context = None,
    cache: _Cache = None,
    policy: _Policy = None,
    out: _Out = None,
    stale: Annotated[bool, typer.Option("--stale", help="only those that a build would write anew")] = False,
) -> None:
    """Print the artifact folder of each target, as a build with the same options names it. Nothing is built.

    Example: python -m export folders smollm2-135m int4-g32-gptq onnx-cpu coreml
    """
    plans, origin = request.asked(
        model, quant, target, source=source, adapter=adapter, name=name, context=context, cache=cache, policy=policy
    )
    root = out and disk.expanded(out)
    places = [(plan, request.place(plan, root, len(plans) > 1)) for plan in plans]
    say(*(str(place) for plan, place in places if not stale or skip.reasons(plan, origin, place)))


if __name__ == "__main__":
    processes.wait_asleep()
    processor.limit_threads()
    sys.exit(run(app))
