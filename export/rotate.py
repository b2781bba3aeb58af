"""A checkpoint with its residual stream and its values turned, computing what it computed; a tied table stays tied.

SpinQuant's R1 and R2 (Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", 2024), random instead of
learned: outliers are spread over all channels. There R1 goes into embedding and head, which the weights of the last
norm then tell apart. Here both stay as they are and R1 stands in the graph, as a linear after the embedding and one,
with the last norm's weights, before the head. What is inside is folded, one tensor at a time: RMSNorm without weights
does not mind being turned.

Shapes: N rows (output features), K columns (input features), D head_dim.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .orthogonal import random_orthogonal
from .plan import ROTATE_IN, ROTATE_OUT, Architecture, QuantRecipe
from .sources.integers import Integers, Unfit

BLOCK_ELEMENTS = 2**21
"""Numbers turned at once."""
BLOCKS_HELD = 4
"""Measured: its rows, the product, and what the matrix library packs."""
FLOAT64_BYTES = 8


def rotated(checkpoint: Checkpoint, recipe: QuantRecipe) -> Checkpoint:
    """What the recipe quantizes: the checkpoint turned, or the checkpoint itself where the recipe turns nothing."""
    if recipe.rotation is None:
        return checkpoint
    architecture = recipe.reshaped(checkpoint.architecture)
    return Checkpoint(RotatedSource(checkpoint, architecture, recipe.rotation.seed), checkpoint.origin, architecture)


def memory_bytes(architecture: Architecture) -> int:
    """The most that reading a turned weight holds beside it, bytes: the rotation, the weight as it was, some blocks."""
    largest = max(rows * columns for rows, columns in architecture.linear_shapes().values())
    return FLOAT64_BYTES * (architecture.hidden_size**2 + BLOCKS_HELD * min(BLOCK_ELEMENTS, largest)) + 4 * largest


@dataclass(frozen=True)
class RotatedSource:
    """As `Source`: turned weights, read and folded one at a time."""

    base: Checkpoint
    architecture: Architecture
    """With the two rotations."""
    seed: int

    @property
    def description(self) -> str:
        return self.base.source.description

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.architecture.tensor_shapes()

    @property
    def files(self) -> tuple[Path, ...]:
        return self.base.source.files

    def write_tokenizer(self, folder: Path) -> None:
        self.base.source.write_tokenizer(folder)

    def integers(self, name: str) -> Integers | Unfit | None:
        """Those of embedding and head; turned weights are other numbers."""
        held = None if name in (ROTATE_IN, ROTATE_OUT) else self.base.integers(name)
        if held is not None and name in self.architecture.linear_shapes():
            return Unfit("the recipe rotates it")
        return held

    def read(self, name: str) -> Tensor:
        """One tensor, float32: the weights of norms are 1, having gone into the linears after them."""
        if name == ROTATE_IN:
            return self.stream.float()
        if name == ROTATE_OUT:
            return (self.base.read("model.norm.weight").double()[:, None] * self.stream.T).float()
        if name in self.architecture.linear_shapes():
            return self.linear(name)
        return torch.ones(self.shapes[name]) if "norm" in name else self.base.read(name)

    def linear(self, name: str) -> Tensor:
        """A linear of a layer: reads a turned stream, or adds to one."""
        layer, part, kind = split_name(name)
        weight = self.base.read(name)
        if kind in ("o_proj", "down_proj"):
            weight = turned(weight.T, self.stream).T
            return (turned_heads(weight, self.values(layer)) if kind == "o_proj" else weight).contiguous()
        norm = "input_layernorm" if part == "self_attn" else "post_attention_layernorm"
        weight = turned(weight.mul_(self.base.read(f"{layer}.{norm}.weight")), self.stream)
        return turned_heads(weight.T, self.values(layer)).T.contiguous() if kind == "v_proj" else weight

    @cached_property
    def stream(self) -> Tensor:
        """R1, float64 [hidden, hidden]: the residual stream h becomes R1 h."""
        return self.draw("stream", self.architecture.hidden_size)

    def values(self, layer: str) -> Tensor:
        """R2, float64 [D, D]: each head's value v becomes R2 v, taken back by the columns of o_proj."""
        return self.draw(layer, self.architecture.head_dim)

    def draw(self, what: str, order: int) -> Tensor:
        """The same whatever is drawn before it."""
        digest = hashlib.sha256(f"{self.seed}/{what}".encode()).digest()
        return random_orthogonal(order, torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


def split_name(name: str) -> tuple[str, str, str]:
    """`model.layers.0.mlp.up_proj.weight` → `model.layers.0`, `mlp`, `up_proj`."""
    layer, part, kind, _ = name.rsplit(".", 3)
    return layer, part, kind


def turned(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Every row x of `vectors` float32 [N, K] as rotation · x, summed in float64, a block of rows at a time."""
    out = torch.empty(vectors.shape)
    rows = max(1, BLOCK_ELEMENTS // vectors.shape[1])
    for block, to in zip(torch.split(vectors, rows), torch.split(out, rows), strict=True):
        to.copy_(block.double() @ rotation.T)
    return out


def turned_heads(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Every head's D numbers of every row of `vectors` float32 [N, heads · D] turned."""
    return turned(vectors.reshape(-1, len(rotation)), rotation).view(vectors.shape)
