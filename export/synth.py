"""python -m export.synth MODEL DIR: a full-size Hugging Face checkpoint with seeded random weights, for trials."""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from .cli import run
from .config_json import config_json
from .errors import ExportError
from .plan import ModelSpec, load_named
from .progress import track
from .sources.seeded import SeededSource

SHARD_BYTES = 1_000_000_000
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
    if folder.exists():
        raise ExportError(f"{folder}: exists already; give a new folder")
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(SeededSource(str(seed), spec.architecture), partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: {model} with random weights, seed {seed}")


def write(source: SeededSource, folder: Path) -> None:
    """All files of the checkpoint, one shard in memory at a time."""
    config = config_json(source.architecture, torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(source, folder)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for name in track(source.shapes, "weights", len(source.shapes)):
        shard[name] = source.read(name).to(torch.bfloat16)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush(shard, weight_map, folder)
    flush(shard, weight_map, folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def flush(shard: dict[str, torch.Tensor], weight_map: dict[str, str], folder: Path) -> None:
    """Write the tensors collected so far as the next shard."""
    file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
    if shard:
        save_file(shard, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()


def write_tokenizer(source: SeededSource, folder: Path) -> None:
    """Llama 3's own tokenizer where the vocabulary is Llama 3's, else the byte tokenizer of seeded models."""
    from .places import package_file
    from .sources import llama3_tokenizer

    if source.architecture.vocab_size == 128256:
        llama3_tokenizer.write(package_file("llama_models/llama3/tokenizer.model"), folder)
    else:
        source.write_tokenizer(folder)


if __name__ == "__main__":
    sys.exit(run(app))
