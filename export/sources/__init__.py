"""Where weights come from: one file per kind of checkpoint, one protocol for all.

Tensor names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..errors import ExportError
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


ADAPTER = "adapter:"
"""`adapter:FOLDER//SPEC` is the checkpoint SPEC with the LoRA adapter in FOLDER merged; no path holds `//`."""


def adapted(spec: str, adapter: Path) -> str:
    """The spec of a checkpoint with an adapter."""
    return f"{ADAPTER}{Path(os.path.expanduser(adapter)).resolve()}//{spec}"  # noqa: PTH111  (see `locate`)


def split_adapter(spec: str) -> tuple[str, str]:
    """`adapter:FOLDER//SPEC` → FOLDER and SPEC."""
    folder, separator, base = spec.removeprefix(ADAPTER).partition("//")
    if not (folder and separator):
        raise ExportError(f"{spec}: expected adapter:FOLDER//CHECKPOINT")
    if base.startswith((ADAPTER, "seed:")):
        raise ExportError(f"{spec}: an adapter is merged into a checkpoint, not into {base.partition(':')[0]}:…")
    return folder, base


def locate(spec: str) -> Path | str:
    """A `source` string of a model YAML or of --source: a local path, or a `hub:`/`seed:`/`adapter:` string."""
    if spec.startswith(ADAPTER):
        folder, base = split_adapter(spec)
        return f"{ADAPTER}{locate(folder)}//{locate(base)}"
    if spec.startswith("package:"):
        return package_file(spec.removeprefix("package:"))
    if spec.startswith(("hub:", "seed:")):
        return spec
    if not spec:
        raise ExportError("--source is empty; give a folder, a .gguf file or a hub id")
    path = Path(os.path.expanduser(spec))  # noqa: PTH111  (Path's own raises for an unknown user)
    if path.exists():
        return path.resolve()
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
        return f"hub:{spec}"
    raise ExportError(f"{spec}: no such file or folder (and not a hub id like owner/name)")


def package_file(spec: str) -> Path:
    """`NAME/FILE` → the file inside an installed Python package, found without importing it."""
    import importlib.util

    package, _, file = spec.partition("/")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # `a.b` without `a`; an empty name
        found = None
    if found is None or not found.submodule_search_locations:
        raise ExportError(f"package {package!r} is not installed: run `make setup`, or give --source")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ExportError(f"{path}: missing; reinstall the package {package!r}")
    return path


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
