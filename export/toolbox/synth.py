"""python -m export.toolbox.synth MODEL DIR: a full-size Hugging Face checkpoint of seeded random weights.

python -m export.toolbox.synth dither MODEL DIR: a checkpoint whose weights do not lie on a 4-bit grid any more.

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
from export.build.command import run, with_default
from export.checkpoints import Checkpoint, tokenizer
from export.checkpoints.origin import Package, parse_origin
from export.checkpoints.seed import SeededSource
from export.errors import ExportError
from export.host.console import say, track
from export.plan import ModelSpec, load_named

from . import writers

_BLOCK, _STEPS = 32, 15
"""Of Q4_1: weights of a block, steps between its least and its greatest."""
_LLAMA3_VOCABULARY = 128256
_Model = Annotated[str, typer.Argument(help="a name in configs/models")]
_NewFolder = Annotated[Path, typer.Argument(help="where the checkpoint goes; must not exist")]
app = typer.Typer(cls=with_default("random"), help=__doc__, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def random(
    model: _Model, folder: _NewFolder, seed: Annotated[int, typer.Option(help="decides every weight")] = 0
) -> None:
    """Write config.json, sharded bf16 safetensors, tokenizer and index."""
    spec = load_named(ModelSpec, "models", model)
    if spec.architecture is None:
        raise ExportError(f"model {model!r} has no architecture of its own; choose another")
    with writers.new_folder(folder) as partial:
        write_random(SeededSource(str(seed), spec.architecture), partial)
    say(f"{folder}: {model} with random weights, seed {seed}")


def write_random(source: SeededSource, folder: Path) -> None:
    """Write all files of the checkpoint, one shard in memory at a time, with Llama 3's tokenizer where that fits."""
    writers.write_config(folder, source.architecture, torch.bfloat16, {})
    if source.architecture.vocab_size == _LLAMA3_VOCABULARY:
        tokenizer.write_tiktoken(Package("llama_models", "llama3/tokenizer.model").path, folder)
    else:
        source.write_tokenizer(folder)
    names = track(source.shapes, "weights", len(source.shapes))
    writers.write_shards(((name, source.read(name).to(torch.bfloat16)) for name in names), folder)


@app.command()
def dither(
    model: _Model,
    folder: _NewFolder,
    source: Annotated[str | None, typer.Option(help="where the weights come from")] = None,
    seed: Annotated[int, typer.Option(help="decides the noise")] = 0,
) -> None:
    """Write a Hugging Face folder in float32."""
    with writers.new_folder(folder) as partial:
        origin = None if source is None else parse_origin(source)
        opened = checkpoints.load(load_named(ModelSpec, "models", model), origin)
        write_dithered(opened, partial, seed)
    say(f"{folder}: {opened.origin} with noise of one Q4_1 step, seed {seed}")


def write_dithered(opened: Checkpoint, folder: Path, seed: int) -> None:
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
