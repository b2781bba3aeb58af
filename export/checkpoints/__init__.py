"""Checkpoints as people have them: one module for each form, one protocol for all. Opened, checked, never executed.

Tensor names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_float
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from export.architecture import EMBEDDING, HEAD, Architecture, RopeScaling
from export.errors import ExportError
from export.host import digests
from export.plan import SHORTEST_CONTEXT, ModelSpec, not_a_file_name

from .files import GATHER, first_bytes, require_contents
from .origin import Adapter, File, Folder, Hub, Origin, Package, Seed, is_meta, is_of_tokenizer, name_of, origin_of

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

    @property
    def notes(self) -> tuple[str, ...]:
        """What is read otherwise than one could expect, a line each, for people who build from it."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, freshly allocated."""

    def integers(self, name: str) -> Integers | Unfit | None:
        """The integers that `read` dequantizes, or why they are of no symmetric scheme; None: it holds floats."""


class Source(Weights, Protocol):
    """An opened checkpoint."""

    @property
    def architecture(self) -> Architecture:
        """Shapes as the checkpoint states them."""

    @property
    def stated_ids(self) -> Mapping[str, Mapping[str, Any]]:
        """File → its fields, of those that state `eos_token_id` and so on besides what `write_tokenizer` writes."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer files (and generation defaults, when the checkpoint has them) into a folder."""


def open_source(origin: Origin, expected: Architecture | None) -> Source:
    """Open a checkpoint. `expected` gives the shapes of seeded weights.

    Raises ExportError: nothing there, unreadable, or a kind we do not read.
    """
    match origin:
        case Adapter():
            from .lora import LoraSource

            return LoraSource(open_source(origin.base, expected), origin.adapter.path, origin.base)
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
            if not (path := origin.path).is_file():
                raise ExportError(f"{path}: not a checkpoint we read; it is no file")
            require_contents(path)
            if not _is_gguf(path):
                raise ExportError(f"{path}: not a checkpoint we read; give {_instead_of(path)}")
            from .gguf import GgufSource

            return GgufSource(path)


def _is_gguf(path: Path) -> bool:
    """By its first bytes, whatever its name: Ollama's blobs have no suffix. A damaged one is told by its suffix."""
    return first_bytes(path).startswith(b"GGUF") or path.suffix.lower() == ".gguf"


def _instead_of(path: Path) -> str:
    """What to give in place of a file that is no whole checkpoint."""
    folder = path.parent
    if path.name.startswith("adapter_"):
        return f"its folder {folder} with --adapter"
    if (folder / "config.json").is_file() or (folder / "params.json").is_file():
        return f"the folder that it is in, {folder}"
    return "a Hugging Face folder, Meta's folder or a .gguf file"


def _open_folder(folder: Path) -> Source:
    if is_meta(folder):
        from .meta import MetaSource

        return MetaSource(folder)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ExportError(f"{folder}: a LoRA adapter, not a model; give it with --adapter, and its base with --source")
    if not (folder / "config.json").exists() and (files := sorted(folder.glob("*.gguf"))):
        which = "that file" if len(files) == 1 else "one of these files"
        raise ExportError(f"{folder}: no config.json, but {_first([path.name for path in files])}; give {which}")
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
    notes: tuple[str, ...] = ()
    """The source's, and what was accepted although the model's YAML says otherwise."""

    @cached_property
    def sha256(self) -> dict[str, str]:
        """File name → digest, of weights, configuration and tokenizer."""
        for path in self.source.files:
            if why := not_a_file_name(name_of(path)):
                raise ExportError(f"{str(path)!r}: its name {why}, which no manifest may hold; rename it")
        return {name_of(path): digests.remembered_sha256(path) for path in self.source.files}

    @property
    def bits_per_weight(self) -> float | None:
        """Size of the files without the tokenizer's over the model's parameters; None: there are no files."""
        files = [path for path in self.source.files if not is_of_tokenizer(name_of(path))]
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
    for path in opened.files:
        require_contents(path)
    architecture, longest = opened.architecture, opened.architecture.max_position_embeddings
    notes = opened.notes
    if (want := model.architecture) is not None:
        _refuse_other_architecture(model.name, want, architecture, origin)
        architecture = want.model_copy(update={"max_position_embeddings": longest})
        if longest != want.max_position_embeddings:
            notes += (
                f"max_position_embeddings is {longest}, {want.max_position_embeddings} in the model {model.name}",
            )
    if model.context_length > longest:
        raise ExportError(
            f"{origin}: context_length {model.context_length} is more than the checkpoint's max_position_embeddings "
            f"{longest}; {_remedy(model, longest)}"
        )
    _check_tensors(opened, architecture, origin)
    return Checkpoint(opened, origin, architecture, notes)


def _remedy(model: ModelSpec, longest: int) -> str:
    if longest < SHORTEST_CONTEXT:
        return f"contexts of less than {SHORTEST_CONTEXT} tokens are not built"
    shorter = model.architecture is not None and longest < model.architecture.max_position_embeddings
    return f"ask for at most {longest}" + (", or use the model `llama`" if shorter else "")


def _refuse_other_architecture(name: str, want: Architecture, got: Architecture, origin: Origin) -> None:
    """A 3B checkpoint must not become an artifact labelled 1B. Where positions end is no shape, and is handled."""
    fields = [name for name in Architecture.model_fields if name != "max_position_embeddings"]
    differ = [key for key in fields if _in_float32(getattr(want, key)) != _in_float32(getattr(got, key))]
    if differ:
        pairs = ", ".join(f"{key} {getattr(got, key)!r} (expected {getattr(want, key)!r})" for key in differ)
        raise ExportError(f"{origin}: not the shapes of {name}: {pairs}; use the model `llama` for other shapes")


def _in_float32(value: object) -> object:
    """A number as it comes back from a file that holds it as float32."""
    if isinstance(value, RopeScaling):
        return {key: _in_float32(number) for key, number in value.model_dump().items()}
    return c_float(value).value if isinstance(value, float) else value


def _check_tensors(source: Source, architecture: Architecture, origin: Origin) -> None:
    """Missing, extra and wrongly shaped tensors, named before any work is done."""
    want, have = architecture.tensor_shapes(), source.shapes
    if missing := sorted(want.keys() - have.keys()):
        reasons = [f"{len(missing)} tensors are missing: {_first(missing)}", *source.notes]
        if missing == [HEAD]:
            reasons.append('set "tie_word_embeddings": true in config.json where the embedding is the head too')
            reasons.append(
                "a head of its own is saved only if it shares no memory (docs/checkpoints.md, LoRA adapters)"
            )
        elif others := sorted(have.keys() - want.keys()):
            reasons.append(f"there are instead: {_first(others)}")
        raise ExportError(f"{origin}: {'; '.join(reasons)}")
    extra = {name for name in have.keys() - want.keys() if not name.endswith(_UNUSED_SUFFIXES)}
    if architecture.tie_word_embeddings and HEAD in extra:
        _refuse_untied_head(source, origin)
        extra.discard(HEAD)
    if extra:
        raise ExportError(f"{origin}: {len(extra)} tensors are not part of the model: {_first(sorted(extra))}")
    for name, shape in want.items():
        if have[name] != shape:
            hint = "" if prod(have[name]) else f"; {GATHER}"
            raise ExportError(
                f"{origin}: tensor {name} has shape {list(have[name])}, the architecture needs {list(shape)}{hint}"
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
