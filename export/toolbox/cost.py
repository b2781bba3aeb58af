"""python -m export.toolbox.cost MODEL QUANT: the time and memory that calibrating a model will take.

The first layers are calibrated as in a build and the rest is extrapolated, because layers have the same shapes.
"""

import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from export import checkpoints
from export.build.command import run
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host import processes
from export.host.console import say
from export.plan import Device, ModelSpec, QuantRecipe, load_named
from export.quantization import processors, schemes
from export.quantization.calibration import Calibrator, round_outside, split, tokens
from export.quantization.rotation import rotated
from export.quantization.spread import exact_products
from export.quantization.store import Unfinished

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_LINEARS_OF_A_LAYER = 7


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    quant: Annotated[str, typer.Argument(help="a recipe with method gptq")],
    source: Annotated[str | None, typer.Option(help="where the weights are, when not where the YAML says")] = None,
    device: Annotated[Device, typer.Option(help="where calibration computes")] = "cpu",
    layers: Annotated[int, typer.Option(min=1, help="layers to calibrate")] = 1,
) -> None:
    """Time and memory of the first layers, and what the whole model would take."""
    recipe = load_named(QuantRecipe, "quant", quant)
    if recipe.gptq is None or recipe.calibration is None:
        raise ExportError(f"recipe {quant!r}: method {recipe.method!r} calibrates no layers; give one with gptq")
    processors.require(device)
    origin = None if source is None else parse_origin(source)
    opened = rotated(checkpoints.load(load_named(ModelSpec, "models", model), origin), recipe)
    whole = opened.architecture.num_hidden_layers
    short = opened.architecture.model_copy(update={"num_hidden_layers": min(layers, whole)})
    opened = dataclasses.replace(opened, architecture=short)
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.inference_mode(),
        processors.computing_on(device),
        exact_products(processors.computing_in(device)),
    ):
        unfinished = Unfinished(Path(folder))
        begun = time.perf_counter()
        outside = round_outside(opened, schemes.of_recipe(recipe, short))
        ids = tokens(opened, recipe.calibration, unfinished, device)
        calibrator = Calibrator(opened, recipe, outside, unfinished, *split(ids, recipe.calibration.held_out_every))
        times = [time.perf_counter()]
        for done, _ in enumerate(calibrator.walk(calibrator.base, unfinished, calibrator.streams()), 1):
            if done % _LINEARS_OF_A_LAYER == 0:
                times.append(time.perf_counter())
                peak = processes.peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) / 1e9
                say(f"layer {len(times) - 2}: {times[-1] - times[-2]:.0f} s, peak memory {peak:.1f} GB", flush=True)
    start_s, layer_s = times[0] - begun, (times[-1] - times[0]) / (len(times) - 1)
    say(f"before the first layer: {start_s:.0f} s")
    say(f"{whole} layers at {layer_s:.0f} s: {(start_s + whole * layer_s) / 60:.0f} minutes ({ids.numel():,} tokens)")


if __name__ == "__main__":
    sys.exit(run(app))
