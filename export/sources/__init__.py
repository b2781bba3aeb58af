"""Where weights come from: one file per kind of checkpoint, one protocol for all.

Tensor names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..errors import ExportError
from ..places import ADAPTER, locate, split_adapter
from ..plan import Architecture
from .integers import Integers, Unfit

GGUF_BYTES_PER_TOKEN = 3400
"""Measured: a GGUF's vocabulary and merges, as the library holds them."""


class Source(Protocol):
    """An opened checkpoint. Tensors are read one at a time, so memory stays at one tensor."""

    @property
    def description(self) -> str:
        """What was found, for people: `GGUF Q4_1, 272 tensors`."""

    @property
    def architecture(self) -> Architecture:
        """Shapes as the checkpoint states them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of every tensor in the checkpoint."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files whose bytes decide the result."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, freshly allocated."""

    def integers(self, name: str) -> Integers | Unfit | None:
        """The integers that `read` dequantizes, or why they are of no symmetric scheme; None: it holds floats."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer files (and generation defaults, when the checkpoint has them) into a folder."""


def open_source(spec: str, expected: Architecture | None) -> Source:
    """Open what `spec` names. `expected` gives the shapes of seeded weights.

    Raises ExportError: nothing there, unreadable, or a kind we do not read.
    """
    if spec.startswith(ADAPTER):
        from .lora import LoraSource

        folder, base = split_adapter(spec)
        if not isinstance(found := locate(folder), Path):
            raise ExportError(f"{folder}: no such folder; download the adapter and give its folder")
        return LoraSource(open_source(base, expected), found)
    place = locate(spec)
    if isinstance(place, str) and place.startswith("seed:"):
        from .seeded import SeededSource

        if expected is None:
            raise ExportError(f"source {spec!r} needs an architecture in the model YAML")
        return SeededSource(place.removeprefix("seed:"), expected)
    if isinstance(place, str):
        from .huggingface import download

        place = download(place.removeprefix("hub:"))
    if place.is_dir():
        return open_folder(place)
    if place.suffix.lower() == ".gguf" and place.is_file():
        from .gguf_file import GgufSource

        return GgufSource(place)
    raise ExportError(f"{place}: not a checkpoint we read; give a Hugging Face folder, Meta's folder or a .gguf file")


def open_folder(folder: Path) -> Source:
    """Meta's own files have a params.json, all other folders a config.json."""
    if (folder / "params.json").is_file() and not (folder / "config.json").is_file():
        from .meta_original import MetaSource

        return MetaSource(folder)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ExportError(f"{folder}: a LoRA adapter, not a model; give it with --adapter, and its base with --source")
    from .huggingface import FolderSource

    return FolderSource(folder)


def memory_bytes(spec: str, architecture: Architecture) -> int:
    """What an opened checkpoint holds besides the tensor being read, bytes.

    A GGUF file stays mapped and its vocabulary is held; a folder's shards are mapped one tensor at a time.
    """
    if spec.startswith(ADAPTER):
        return memory_bytes(split_adapter(spec)[1], architecture)
    place = locate(spec)
    if isinstance(place, Path) and place.suffix.lower() == ".gguf":
        return place.stat().st_size + GGUF_BYTES_PER_TOKEN * architecture.vocab_size
    return 0


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_shape(source: str, name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    """Refuse a tensor whose shape is not the architecture's."""
    if got != want:
        raise ExportError(f"{source}: tensor {name} has shape {list(got)}, the architecture needs {list(want)}")
