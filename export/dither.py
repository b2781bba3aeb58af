"""python -m export.dither MODEL DIR: a checkpoint whose weights do not lie on a 4-bit grid any more.

SmolLM2-135M comes as Q4_1: every block of 32 weights has 16 values. A quantizer that finds that grid loses nothing,
which says nothing about full-precision weights. So seeded noise, uniform and as wide as one step of Q4_1, is added to
every linear and the embedding: what comes out is a model of its own, almost as good, to compare quantizers on.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import checkpoint, tokenizer
from .checkpoint import Checkpoint
from .cli import run
from .config_json import config_json
from .errors import ExportError
from .plan import ModelSpec, load_named
from .progress import track
from .synth import flush

BLOCK, STEPS = 32, 15
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
    if folder.exists():
        raise ExportError(f"{folder}: exists already; give a new folder")
    opened = checkpoint.load(load_named(ModelSpec, "models", model), source)
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(opened, partial, seed)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: {opened.origin} with noise of one Q4_1 step, seed {seed}")


def write(opened: Checkpoint, folder: Path, seed: int) -> None:
    """All files of the checkpoint."""
    ids = tokenizer.write(opened.source, folder, opened.architecture.vocab_size)
    config = config_json(opened.architecture, torch.float32)
    config |= {"bos_token_id": ids.bos_id, "eos_token_id": list(ids.eos_ids)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    shapes, weight_map, shard = opened.architecture.tensor_shapes(), dict[str, str](), dict[str, torch.Tensor]()
    for name in track(shapes, "weights", len(shapes)):
        weight = opened.read(name)
        shard[name] = weight if "norm" in name else dithered(weight, generator)
    flush(shard, weight_map, folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def dithered(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """weight [N, K] plus noise within half a step of each of its blocks."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / STEPS
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).reshape(weight.shape)


if __name__ == "__main__":
    sys.exit(run(app))
