"""python -m export.toolbox.dither MODEL DIR: a checkpoint whose weights do not lie on a 4-bit grid any more.

SmolLM2-135M comes as Q4_1: every block of 32 weights has 16 values. A quantizer that finds that grid loses nothing,
which says nothing about full-precision weights. So seeded noise, uniform and as wide as one step of Q4_1, is added to
every linear and the embedding: the result is another model, almost as good, on which quantizers can be compared.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from export import checkpoints
from export.build.command import run
from export.checkpoints import Checkpoint
from export.checkpoints.origin import parse_origin
from export.host.console import say, track
from export.plan import ModelSpec, load_named

from . import writers

_BLOCK, _STEPS = 32, 15
"""Of Q4_1: weights of a block, steps between its least and its greatest."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    folder: Annotated[Path, typer.Argument(help="where the checkpoint goes; must not exist")],
    source: Annotated[str | None, typer.Option(help="where the weights come from")] = None,
    seed: Annotated[int, typer.Option(help="decides the noise")] = 0,
) -> None:
    """Write a Hugging Face folder in float32."""
    with writers.new_folder(folder) as partial:
        origin = None if source is None else parse_origin(source)
        opened = checkpoints.load(load_named(ModelSpec, "models", model), origin)
        write(opened, partial, seed)
    say(f"{folder}: {opened.origin} with noise of one Q4_1 step, seed {seed}")


def write(opened: Checkpoint, folder: Path, seed: int) -> None:
    """Write all files of the checkpoint."""
    writers.write_description(opened, folder, torch.float32)
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str) -> torch.Tensor:
        weight = opened.read(name)
        return weight if "norm" in name else dithered(weight, generator)

    shapes = opened.architecture.tensor_shapes()
    writers.write_shards(((name, tensor(name)) for name in track(shapes, "weights", len(shapes))), folder)


def dithered(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """weight [N, K] plus noise within half a step of each of its blocks."""
    blocks = weight.reshape(len(weight), -1, _BLOCK)
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / _STEPS
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).reshape(weight.shape)


if __name__ == "__main__":
    sys.exit(run(app))
