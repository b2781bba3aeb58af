"""python -m export.toolbox.synth MODEL DIR: a full-size Hugging Face checkpoint of seeded random weights."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from export.build.command import run
from export.checkpoints.seed import SeededSource
from export.errors import ExportError
from export.host.console import say, track
from export.plan import ModelSpec, load_named

from . import writers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    folder: Annotated[Path, typer.Argument(help="where the checkpoint goes; must not exist")],
    seed: Annotated[int, typer.Option(help="decides every weight")] = 0,
) -> None:
    """Write config.json, sharded bf16 safetensors, tokenizer and index."""
    spec = load_named(ModelSpec, "models", model)
    if spec.architecture is None:
        raise ExportError(f"model {model!r} has no architecture of its own; choose another")
    with writers.new_folder(folder) as partial:
        write(SeededSource(str(seed), spec.architecture), partial)
    say(f"{folder}: {model} with random weights, seed {seed}")


def write(source: SeededSource, folder: Path) -> None:
    """Write all files of the checkpoint, one shard in memory at a time."""
    writers.write_config(folder, source.architecture, torch.bfloat16, {})
    _write_tokenizer(source, folder)
    names = track(source.shapes, "weights", len(source.shapes))
    writers.write_shards(((name, source.read(name).to(torch.bfloat16)) for name in names), folder)


def _write_tokenizer(source: SeededSource, folder: Path) -> None:
    """Llama 3's own tokenizer where the vocabulary is Llama 3's, else the byte tokenizer of seeded models."""
    from export.checkpoints import tokenizer
    from export.checkpoints.origin import Package

    if source.architecture.vocab_size == 128256:
        tokenizer.write_tiktoken(Package("llama_models", "llama3/tokenizer.model").path, folder)
    else:
        source.write_tokenizer(folder)


if __name__ == "__main__":
    sys.exit(run(app))
