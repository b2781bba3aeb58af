"""A checkpoint that fits its plan: every tensor used or declared unused, shapes right, numbers finite."""

from dataclasses import dataclass
from functools import cached_property

import torch

from .errors import ExportError
from .places import origin_of
from .plan import Architecture, ModelSpec
from .sources import Source, open_source, require_shape, sha256
from .sources.integers import Integers, Unfit

# Buffers that old checkpoints carry and the model computes itself.
UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".attn_rot_embd")


@dataclass(frozen=True)
class Checkpoint:
    """An opened, checked checkpoint."""

    source: Source
    origin: str
    """The source string it was opened from."""
    architecture: Architecture

    @cached_property
    def sha256(self) -> dict[str, str]:
        """File name → digest."""
        return {path.name: sha256(path) for path in self.source.files}

    @property
    def bits_per_weight(self) -> float | None:
        """Of all its files over the model's parameters; None: there are no files."""
        if not self.source.files:
            return None
        parameters = sum(torch.Size(shape).numel() for shape in self.architecture.tensor_shapes().values())
        return round(8 * sum(path.stat().st_size for path in self.source.files) / parameters, 2)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, float32; NaN or infinity is an error that names it."""
        tensor = self.source.read(name)
        if not all(map(torch.isfinite, tensor.aminmax())):  # one pass; NaN is carried into both
            raise ExportError(f"{self.origin}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        return tensor

    def integers(self, name: str) -> Integers | Unfit | None:
        """As in `Source`."""
        return self.source.integers(name)


def architecture_of(model: ModelSpec, source: str | None) -> Architecture:
    """The model's shapes; those of a model without any stand in the checkpoint's header, and no weight is read."""
    return model.architecture or open_source(origin_of(model, source), None).architecture


def load(model: ModelSpec, source: str | None) -> Checkpoint:
    """Open `source` (or the model's own) and check it against the model's architecture."""
    origin = origin_of(model, source)
    opened = open_source(origin, model.architecture)
    architecture = opened.architecture
    if model.architecture is not None:
        refuse_other_architecture(model.name, model.architecture, architecture, origin)
    if model.context_length > architecture.max_position_embeddings:
        raise ExportError(
            f"model {model.name!r}: context_length {model.context_length} is more than the checkpoint's "
            f"max_position_embeddings {architecture.max_position_embeddings}"
        )
    check_tensors(opened, architecture, origin)
    return Checkpoint(opened, origin, architecture)


def refuse_other_architecture(name: str, want: Architecture, got: Architecture, origin: str) -> None:
    """A 3B checkpoint must not become an artifact that says 1B."""
    differ = [key for key in Architecture.model_fields if getattr(want, key) != getattr(got, key)]
    if differ:
        pairs = ", ".join(f"{key} {getattr(got, key)!r} (expected {getattr(want, key)!r})" for key in differ)
        raise ExportError(f"{origin}: not the shapes of {name}: {pairs}; use the model `llama` for other shapes")


def check_tensors(source: Source, architecture: Architecture, origin: str) -> None:
    """Missing, extra and wrongly shaped tensors, named before any work is done."""
    want, have = architecture.tensor_shapes(), source.shapes
    if missing := sorted(want.keys() - have.keys()):
        raise ExportError(f"{origin}: {len(missing)} tensors are missing: {some(missing)}")
    extra = {name for name in have.keys() - want.keys() if not name.endswith(UNUSED_SUFFIXES)}
    if architecture.tie_word_embeddings and "lm_head.weight" in extra:
        refuse_untied_head(source, origin)
        extra.discard("lm_head.weight")
    if extra:
        raise ExportError(f"{origin}: {len(extra)} tensors are not part of the model: {some(sorted(extra))}")
    for name, shape in want.items():
        require_shape(origin, name, have[name], shape)


def refuse_untied_head(source: Source, origin: str) -> None:
    """A tied checkpoint may carry the head again, but only as the same numbers."""
    if not torch.equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
        raise ExportError(
            f"{origin}: lm_head.weight differs from model.embed_tokens.weight although tie_word_embeddings is true; "
            "set it to false in config.json"
        )


def some(names: list[str]) -> str:
    """The first three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
