"""Checkpoints as people have them: one module for each form, one protocol for all. Opened, checked, never executed.

Tensor names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from export.architecture import EMBEDDING, HEAD, Architecture
from export.errors import ExportError
from export.host import digests
from export.plan import ModelSpec, not_a_file_name

from .origin import TOKENIZER_NAMES, Adapter, File, Folder, Hub, Origin, Package, Seed, is_meta, origin_of

if TYPE_CHECKING:  # whether a build may be skipped is decided without torch
    import torch

    from .integers import Integers, Unfit

_GGUF_BYTES_PER_TOKEN = 3400
"""Measured: a GGUF's vocabulary and merges, as the library holds them."""
_UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".attn_rot_embd")
"""Of buffers that old checkpoints carry and the model computes itself."""


class Weights(Protocol):
    """Opened weight files. Tensors are read one at a time, so memory stays at one tensor."""

    @property
    def description(self) -> str:
        """What they hold, for people: `GGUF Q4_1, 272 tensors`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of every tensor, as `read` gives it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files whose bytes decide the result; of a whole checkpoint, those of configuration and tokenizer too."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, freshly allocated."""

    def integers(self, name: str) -> Integers | Unfit | None:
        """The integers that `read` dequantizes, or why they are of no symmetric scheme; None: it holds floats."""


class Source(Weights, Protocol):
    """An opened checkpoint."""

    @property
    def architecture(self) -> Architecture:
        """Shapes as the checkpoint states them."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer files (and generation defaults, when the checkpoint has them) into a folder."""


def open_source(origin: Origin, expected: Architecture | None) -> Source:
    """Open a checkpoint. `expected` gives the shapes of seeded weights.

    Raises ExportError: nothing there, unreadable, or a kind we do not read.
    """
    match origin:
        case Adapter():
            from .lora import LoraSource

            return LoraSource(open_source(origin.base, expected), origin.adapter.path)
        case Seed():
            from .seed import SeededSource

            if expected is None:
                raise ExportError(f"source {str(origin)!r} needs an architecture in the model YAML")
            return SeededSource(origin.number, expected)
        case Hub():
            from .folder import download

            return _open_folder(download(origin))
        case Folder():
            return _open_folder(origin.path)
        case File() | Package():
            if (path := origin.path).suffix.lower() == ".gguf" and path.is_file():
                from .gguf import GgufSource

                return GgufSource(path)
            raise ExportError(
                f"{path}: not a checkpoint we read; give a Hugging Face folder, Meta's folder or a .gguf file"
            )


def _open_folder(folder: Path) -> Source:
    if is_meta(folder):
        from .meta import MetaSource

        return MetaSource(folder)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ExportError(f"{folder}: a LoRA adapter, not a model; give it with --adapter, and its base with --source")
    from .folder import FolderSource

    return FolderSource(folder)


def memory_bytes(origin: Origin, architecture: Architecture) -> int:
    """What an opened checkpoint holds besides the tensor being read, bytes.

    A GGUF file stays mapped and its vocabulary is held; a folder's shards are mapped one tensor at a time.
    """
    match origin:
        case Adapter():
            return memory_bytes(origin.base, architecture)
        case File() | Package():
            return origin.path.stat().st_size + _GGUF_BYTES_PER_TOKEN * architecture.vocab_size
        case _:
            return 0


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose tensors are those of the architecture."""

    source: Source
    origin: Origin
    architecture: Architecture

    @cached_property
    def sha256(self) -> dict[str, str]:
        """File name → digest, of weights, configuration and tokenizer."""
        for path in self.source.files:
            if why := not_a_file_name(path.name):
                raise ExportError(f"{str(path)!r}: its name {why}, which no manifest may hold; rename it")
        return {path.name: digests.remembered_sha256(path) for path in self.source.files}

    @property
    def bits_per_weight(self) -> float | None:
        """Size of the files without the tokenizer's over the model's parameters; None: there are no files."""
        files = [path for path in self.source.files if path.name not in TOKENIZER_NAMES]
        if not files:
            return None
        parameters = sum(prod(shape) for shape in self.architecture.tensor_shapes().values())
        return round(8 * sum(path.stat().st_size for path in files) / parameters, 2)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, float32; NaN or infinity is an error that names it."""
        tensor = self.source.read(name)
        if not all(bound.isfinite() for bound in tensor.aminmax()):  # one pass; NaN is carried into both
            raise ExportError(f"{self.origin}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        return tensor

    def integers(self, name: str) -> Integers | Unfit | None:
        return self.source.integers(name)


def architecture_of(model: ModelSpec, source: Origin | None) -> Architecture:
    """The model's shapes, or for a model without any those in the checkpoint's header; no weight is read."""
    return model.architecture or open_source(origin_of(model, source), None).architecture


def load(model: ModelSpec, source: Origin | None) -> Checkpoint:
    """Open `source` (or the model's own) and check it against the model's architecture."""
    origin = origin_of(model, source)
    opened = open_source(origin, model.architecture)
    architecture = opened.architecture
    if model.architecture is not None:
        _refuse_other_architecture(model.name, model.architecture, architecture, origin)
    if model.context_length > architecture.max_position_embeddings:
        raise ExportError(
            f"model {model.name!r}: context_length {model.context_length} is more than the checkpoint's "
            f"max_position_embeddings {architecture.max_position_embeddings}"
        )
    _check_tensors(opened, architecture, origin)
    return Checkpoint(opened, origin, architecture)


def _refuse_other_architecture(name: str, want: Architecture, got: Architecture, origin: Origin) -> None:
    """A 3B checkpoint must not become an artifact labelled 1B."""
    differ = [key for key in Architecture.model_fields if getattr(want, key) != getattr(got, key)]
    if differ:
        pairs = ", ".join(f"{key} {getattr(got, key)!r} (expected {getattr(want, key)!r})" for key in differ)
        raise ExportError(f"{origin}: not the shapes of {name}: {pairs}; use the model `llama` for other shapes")


def _check_tensors(source: Source, architecture: Architecture, origin: Origin) -> None:
    """Missing, extra and wrongly shaped tensors, named before any work is done."""
    want, have = architecture.tensor_shapes(), source.shapes
    if missing := sorted(want.keys() - have.keys()):
        raise ExportError(f"{origin}: {len(missing)} tensors are missing: {_first(missing)}")
    extra = {name for name in have.keys() - want.keys() if not name.endswith(_UNUSED_SUFFIXES)}
    if architecture.tie_word_embeddings and HEAD in extra:
        _refuse_untied_head(source, origin)
        extra.discard(HEAD)
    if extra:
        raise ExportError(f"{origin}: {len(extra)} tensors are not part of the model: {_first(sorted(extra))}")
    for name, shape in want.items():
        if have[name] != shape:
            raise ExportError(
                f"{origin}: tensor {name} has shape {list(have[name])}, the architecture needs {list(shape)}"
            )


def _refuse_untied_head(source: Source, origin: Origin) -> None:
    """A tied checkpoint may carry the head again, but only as the same numbers."""
    if not source.read(HEAD).equal(source.read(EMBEDDING)):
        raise ExportError(
            f"{origin}: {HEAD} differs from {EMBEDDING} although tie_word_embeddings is true; "
            "set it to false in config.json"
        )


def _first(names: list[str]) -> str:
    """Three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
