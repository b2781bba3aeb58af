"""The checkpoint in rotated coordinates: it computes the same, and no channel stands out when it is rounded.

Residual stream h and each head's values v are replaced by R1 h and R2 v, with R1 and R2 orthogonal: linears that write
them are multiplied by the rotation, linears that read them by its inverse, which is its transpose. RMSNorm commutes
with R1 except for its weights (|R1 h| = |h|), so these go into the linears that read the norm (QuaRot, Ashkboos et al.,
2024).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isqrt, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.architecture import FINAL_NORM, ROTATE_IN, ROTATE_OUT, Architecture
from export.checkpoints import Checkpoint
from export.checkpoints.integers import Integers, Unfit
from export.plan import QuantRecipe


def random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """float64 [order, order], the same for the same state of the generator.

    Randomized Hadamard as in QuaRot: its entries are all of one size, so int8 holds them but for the rounding of one
    scale. Else the Q of a Gaussian matrix, with the signs that make it uniform (Mezzadri, "How to generate random
    matrices from the classical compact groups", 2007).
    """
    matrix = hadamard(order)
    if matrix is None:
        q, r = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator))
        signed: Tensor = q * r.diagonal().sign()
        return signed
    signs = 2 * torch.randint(0, 2, (order,), generator=generator) - 1
    return matrix * signs / sqrt(order)


def hadamard(order: int) -> Tensor | None:
    """±1, float64 [order, order], rows orthogonal; None where Sylvester's and Paley's constructions give none."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = hadamard(order // 2) if order % 2 == 0 else None
    if half is not None:
        return torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), half)
    return _paley(order)


def _paley(order: int) -> Tensor | None:
    """Paley's two constructions ("On orthogonal matrices", 1933) from a prime q: order q + 1 or 2 (q + 1).

    −1 is a square modulo q if q % 4 = 1, so the matrix of squares is symmetric then, and antisymmetric if q % 4 = 3:
    this decides which construction has orthogonal rows.
    """
    if _is_prime(q := order - 1) and q % 4 == 3:
        return torch.eye(order, dtype=torch.float64) + _bordered(q, below=-1)
    if order % 2 == 0 and _is_prime(q := order // 2 - 1) and q % 4 == 1:
        twice, once = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
        return torch.kron(_bordered(q, below=1), twice) + torch.kron(torch.eye(q + 1, dtype=torch.float64), once)
    return None


def _bordered(q: int, *, below: int) -> Tensor:
    """[q + 1, q + 1]: whether i − j is a square modulo q (±1, 0 on the diagonal), a row of 1 and a column `below`."""
    residues = torch.full((q,), -1, dtype=torch.float64)
    residues[torch.arange(1, q).square() % q] = 1
    residues[0] = 0
    index = torch.arange(q)
    out = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    out[0, 1:], out[1:, 0] = 1, below
    out[1:, 1:] = residues[(index[:, None] - index) % q]
    return out


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, isqrt(n) + 1))


# ── the rotated checkpoint ──────────────────────────────────────────────────────────────────────────────────────────

_BLOCK_ELEMENTS = 2**21
"""Numbers that are rotated at once."""
_BLOCKS_HELD = 4
"""Measured: its rows, the product, and what the matrix library packs."""
_FLOAT64_BYTES = 8


def rotated(checkpoint: Checkpoint, recipe: QuantRecipe) -> Checkpoint:
    """What the recipe quantizes: the checkpoint rotated, or the checkpoint itself where the recipe rotates nothing."""
    if recipe.rotation is None:
        return checkpoint
    architecture = recipe.reshaped(checkpoint.architecture)
    return Checkpoint(_RotatedSource(checkpoint, architecture, recipe.rotation.seed), checkpoint.origin, architecture)


def memory_bytes(architecture: Architecture) -> int:
    """The most that reading a rotated weight holds beside it, bytes: rotation, the weight as it was, some blocks."""
    largest = max(rows * columns for rows, columns in architecture.linear_shapes().values())
    return _FLOAT64_BYTES * (architecture.hidden_size**2 + _BLOCKS_HELD * min(_BLOCK_ELEMENTS, largest)) + 4 * largest


@dataclass(frozen=True)
class _RotatedSource:
    """A `Source` of rotated weights, read and folded one at a time."""

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

    @property
    def notes(self) -> tuple[str, ...]:
        return self.base.source.notes

    @property
    def stated_ids(self) -> Mapping[str, Mapping[str, Any]]:
        return self.base.source.stated_ids

    def write_tokenizer(self, folder: Path) -> None:
        self.base.source.write_tokenizer(folder)

    def integers(self, name: str) -> Integers | Unfit | None:
        """Those of embedding and head; rotated weights are different numbers."""
        held = None if name in (ROTATE_IN, ROTATE_OUT) else self.base.integers(name)
        if held is not None and name in self.architecture.linear_shapes():
            return Unfit("the recipe rotates it")
        return held

    def read(self, name: str) -> Tensor:
        """One tensor, float32: the weights of norms are 1, having gone into the linears after them."""
        if name == ROTATE_IN:
            return self.stream.float()
        if name == ROTATE_OUT:
            # back to h, times the last norm's weights: diag(w) R1ᵀ, after which head and tied table are as they were
            return (self.base.read(FINAL_NORM).double()[:, None] * self.stream.T).float()
        if name in self.architecture.linear_shapes():
            return self.linear(name)
        return torch.ones(self.shapes[name]) if "norm" in name else self.base.read(name)

    def linear(self, name: str) -> Tensor:
        """R1 W where it adds to the stream, W diag(norm) R1ᵀ where it reads it; v_proj and o_proj with R2, too."""
        layer, part, kind = _split_name(name)
        weight = self.base.read(name)
        if kind in ("o_proj", "down_proj"):
            weight = rotate_rows(weight.T, self.stream).T
            return (rotate_heads(weight, self.values(layer)) if kind == "o_proj" else weight).contiguous()
        norm = "input_layernorm" if part == "self_attn" else "post_attention_layernorm"
        weight = rotate_rows(weight.mul_(self.base.read(f"{layer}.{norm}.weight")), self.stream)
        return rotate_heads(weight.T, self.values(layer)).T.contiguous() if kind == "v_proj" else weight

    @cached_property
    def stream(self) -> Tensor:
        """R1, float64 [hidden, hidden]: the residual stream h becomes R1 h."""
        return self.draw("stream", self.architecture.hidden_size)

    def values(self, layer: str) -> Tensor:
        """R2, float64 [D, D]: each head's value v becomes R2 v, taken back by the columns of o_proj."""
        return self.draw(layer, self.architecture.head_dim)

    def draw(self, name: str, order: int) -> Tensor:
        """Seeded by name, so that no rotation depends on which were drawn before."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return random_orthogonal(order, torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


def _split_name(name: str) -> tuple[str, str, str]:
    """`model.layers.0.mlp.up_proj.weight` → `model.layers.0`, `mlp`, `up_proj`."""
    layer, part, kind, _ = name.rsplit(".", 3)
    return layer, part, kind


def rotate_rows(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Every row x of `vectors` float32 [N, K] → rotation · x, summed in float64, a block of rows at a time."""
    out = torch.empty(vectors.shape)
    rows = max(1, _BLOCK_ELEMENTS // vectors.shape[1])
    for block, to in zip(torch.split(vectors, rows), torch.split(out, rows), strict=True):
        to.copy_(block.double() @ rotation.T)
    return out


def rotate_heads(vectors: Tensor, rotation: Tensor) -> Tensor:
    """`rotate_rows` of every head's D numbers in every row of `vectors` float32 [N, heads · D]."""
    return rotate_rows(vectors.reshape(-1, len(rotation)), rotation).view(vectors.shape)
