"""Tensor names as training left them, read under Hugging Face's; a tied model's one table as its embedding."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from export.architecture import EMBEDDING, HEAD
from export.errors import ExportError

if TYPE_CHECKING:
    import torch

    from . import Weights
    from .integers import Integers, Unfit

_WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put before a module's name, at any depth."""
_BASE = "model."
"""What LlamaForCausalLM puts before the names of LlamaModel."""
_UNMERGED = re.compile(r"\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|base_layer)(?:\.|$)")


@dataclass(frozen=True)
class _Renamed:
    """Weights under other names than their files'."""

    weights: "Weights"
    stored: Mapping[str, str]
    """Hugging Face's name → the file's."""
    notes: tuple[str, ...]

    @property
    def description(self) -> str:
        return self.weights.description

    @property
    def files(self) -> tuple[Path, ...]:
        return self.weights.files

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self.weights.shapes[stored] for name, stored in self.stored.items()}

    def read(self, name: str) -> "torch.Tensor":
        return self.weights.read(self.stored[name])

    def integers(self, name: str) -> "Integers | Unfit | None":
        return self.weights.integers(self.stored[name])


def renamed(weights: "Weights", folder: Path, *, tied: bool) -> "Weights":
    """The weights under Hugging Face's names, with a note where the files' are others.

    Raises ExportError: an unmerged adapter, or names of which only a part has a prefix.
    """
    if any(map(_UNMERGED.search, weights.shapes)):
        raise ExportError(
            f"{folder}: a LoRA adapter that is not merged; call `merge_and_unload` before `save_pretrained`, or save "
            "the adapter alone and give it with --adapter"
        )
    prefix = _prefix_of(map(_unwrapped, weights.shapes))
    names: dict[str, str] = {}
    for stored in weights.shapes:
        name = _unwrapped(stored)
        if not name.startswith(prefix):
            raise ExportError(
                f"{folder}: the model's names begin with {prefix!r}, but {stored!r:.80} does not; save the language "
                "model alone"
            )
        names[name.removeprefix(prefix)] = stored
    notes = [f"names of tensors begin with {prefix!r}, which is left out"] if prefix else []
    if any(map(_WRAPPERS.search, weights.shapes)):
        notes.append("names of tensors hold training wrappers (_orig_mod, _fsdp_wrapped_module …), which are left out")
    if EMBEDDING.removeprefix(_BASE) in names:
        names = {name if name == HEAD else _BASE + name: stored for name, stored in names.items()}
        notes.append(f"names of tensors lack {_BASE!r}, which is put before them as transformers does")
    if len(names) < len(weights.shapes):
        raise ExportError(f"{folder}: some tensors are there under two names; save the model again")
    if tied and EMBEDDING not in names and HEAD in names:
        names[EMBEDDING] = names.pop(HEAD)
        notes.append(f"{HEAD} is read as {EMBEDDING} too, which is not there: the two are tied")
    return _Renamed(weights, names, (*weights.notes, *notes)) if notes else weights


def _unwrapped(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _prefix_of(names: Iterable[str]) -> str:
    """What stands before the embedding's name, or the head's where there is no embedding."""
    listed = list(names)
    for known in (EMBEDDING, EMBEDDING.removeprefix(_BASE), HEAD):
        found = sorted((name for name in listed if f".{name}".endswith(f".{known}")), key=len)
        if found:
            return found[0].removesuffix(known)
    return ""
