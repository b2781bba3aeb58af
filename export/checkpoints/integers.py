"""Integers that checkpoints hold, folders in which they are stored in parts, and the order of query and key rows.

Rotary embedding turns pairs of a head's D rows: (2i, 2i + 1) for Meta and llama.cpp, (i, i + D/2) for Hugging Face.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from export.architecture import Architecture
from export.plan import Levels

from .safetensors import SafetensorsFiles


def in_hugging_face_order(name: str, weight: torch.Tensor, a: Architecture) -> torch.Tensor:
    """Query and key rows with rotary halves apart, all other weights unchanged. `name` is Hugging Face's."""
    heads = _heads(name, a)
    return halves_apart(weight, heads) if heads else weight


def in_meta_order(name: str, weight: torch.Tensor, a: Architecture) -> torch.Tensor:
    """The inverse of `in_hugging_face_order`."""
    heads = _heads(name, a)
    return pairs_together(weight, heads) if heads else weight


def halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads · D, K] with rotary pairs (2i, 2i+1) → pairs (i, i + D/2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads · D, K] with rotary pairs (i, i + D/2) → pairs (2i, 2i+1)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _heads(name: str, a: Architecture) -> int | None:
    if name.endswith("self_attn.q_proj.weight"):
        return a.num_attention_heads
    return a.num_key_value_heads if name.endswith("self_attn.k_proj.weight") else None


@dataclass(frozen=True)
class Integers:
    """weight[n, k] = level(qdata[n, k]) · scale[n, k // group], exactly as `Source.read` gives it."""

    qdata: torch.Tensor
    """int8 [N, K], within −2^(bits − 1) … 2^(bits − 1) − 1"""
    scale: torch.Tensor
    """float32 [N, K/group], finite"""
    bits: int
    levels: Levels = "even"
    """Even levels are the integers themselves; of others `qdata` holds the codes less 8."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.qdata.shape[1] // self.scale.shape[1]


@dataclass(frozen=True)
class Unfit:
    """A checkpoint's integers that no symmetric scheme holds."""

    reason: str
    """For a line of output: `zero points that are not the middle`."""


OFFSET = 8
"""A code less this is what `qdata` holds."""
TABLES: dict[Levels, torch.Tensor] = {
    "nf4": torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]),
    "fp4": torch.tensor([
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ]),
}  # fmt: skip


def values_of(qdata: torch.Tensor, levels: Levels) -> torch.Tensor:
    """int8 [N, K] → float32 [N, K], to be multiplied by the scales."""
    return qdata.float() if levels == "even" else TABLES[levels][qdata.int() + OFFSET]


@dataclass(frozen=True)
class QuantizedFiles(ABC):
    """Safetensors in which some weights are stored in parts, as integers: what bitsandbytes, GPTQ and torchao share."""

    stored: SafetensorsFiles
    quantized: Mapping[str, tuple[int, ...]]
    """Name → shape [N, K] of every weight stored in parts."""

    @staticmethod
    @abstractmethod
    def owner(name: str) -> str | None:
        """The quantized weight or linear that a stored tensor belongs to; None for a tensor of its own."""

    @property
    @abstractmethod
    def description(self) -> str: ...

    @abstractmethod
    def dequantize(self, name: str) -> torch.Tensor:
        """A quantized weight as float32 [N, K]."""

    @abstractmethod
    def unpack(self, name: str) -> Integers | Unfit:
        """A quantized weight's integers."""

    @property
    def files(self) -> tuple[Path, ...]:
        return self.stored.files

    @property
    def notes(self) -> tuple[str, ...]:
        return self.stored.notes

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        floats = {name: shape for name, shape in self.stored.shapes.items() if self.owner(name) is None}
        return floats | dict(self.quantized)

    def read(self, name: str) -> torch.Tensor:
        return self.dequantize(name) if name in self.quantized else self.stored.read(name)

    def integers(self, name: str) -> Integers | Unfit | None:
        return self.unpack(name) if name in self.quantized else None

    @property
    def float_linears(self) -> list[str]:
        return [name for name in self.shapes if _is_linear(name) and name not in self.quantized]

    def coverage(self, floats: str = "floats") -> str:
        """`all 210 linears`, or `3 of 210 linears in floats`."""
        linears = sum(map(_is_linear, self.shapes))
        count = len(self.float_linears)
        return f"{count} of {linears} linears in {floats}" if count else f"all {linears} linears"


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")
