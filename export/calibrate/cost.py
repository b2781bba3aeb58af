"""What calibrating a model will take: `python -m export.calibrate.cost MODEL QUANT [--source …] [--layers N]`.

The first layers are calibrated as in a build, and the rest is extrapolated: layers are alike.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import checkpoint, memory, schemes
from ..cli import run
from ..errors import ExportError
from ..plan import ModelSpec, QuantRecipe, load_named
from ..rotate import rotated
from ..rounding import round_to_nearest
from . import Calibrator, split, tokens
from .unfinished import Unfinished

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
LINEARS_OF_A_LAYER = 7


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    quant: Annotated[str, typer.Argument(help="a recipe with method gptq")],
    source: Annotated[str | None, typer.Option(help="where the weights are, when not where the YAML says")] = None,
    layers: Annotated[int, typer.Option(min=1, help="layers to calibrate")] = 1,
) -> None:
    """Time and memory of the first layers, and what the whole model would take."""
    recipe = load_named(QuantRecipe, "quant", quant)
    if recipe.gptq is None or recipe.calibration is None:
        raise ExportError(f"recipe {quant!r}: method {recipe.method!r} has no cost to speak of; give one with gptq")
    opened = rotated(checkpoint.load(load_named(ModelSpec, "models", model), source), recipe)
    whole = opened.architecture.num_hidden_layers
    short = opened.architecture.model_copy(update={"num_hidden_layers": min(layers, whole)})
    opened = dataclasses.replace(opened, architecture=short)
    with tempfile.TemporaryDirectory() as folder:
        unfinished = Unfinished(Path(folder))
        begun = time.perf_counter()
        others = {
            name: round_to_nearest(opened.read(name), scheme)
            for name, scheme in schemes.of_recipe(recipe, short).by_name.items()
            if name not in short.linear_shapes()
        }
        ids = tokens(opened, recipe.calibration, unfinished)
        calibrator = Calibrator(opened, recipe, others, unfinished, *split(ids, recipe.calibration.held_out_every))
        times = [time.perf_counter()]
        with torch.inference_mode():
            for done, _ in enumerate(calibrator.walk(calibrator.base, unfinished, calibrator.streams()), 1):
                if done % LINEARS_OF_A_LAYER == 0:
                    times.append(time.perf_counter())
                    peak = memory.peak_rss_bytes() / 1e9
                    print(
                        f"layer {len(times) - 2}: {times[-1] - times[-2]:.0f} s, peak memory {peak:.1f} GB", flush=True
                    )
    each = (times[-1] - times[0]) / (len(times) - 1)
    print(f"before the first layer: {times[0] - begun:.0f} s")
    print(
        f"{whole} layers at {each:.0f} s: {(times[0] - begun + whole * each) / 60:.0f} minutes ({ids.numel():,} tokens)"
    )


if __name__ == "__main__":
    sys.exit(run(app))
