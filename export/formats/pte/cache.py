"""Keys and values of a layer as mutable buffers, and attention over them, by ExecuTorch's own operators.

Shapes: S new tokens, C slots, H query heads, G key/value heads, D head_dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401  (registers the quantizing ones for programs)
import torch
from torch import Tensor, nn
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  (registers its operators)

from export.manifest import KVLayout

Buffers = dict[str, Tensor]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_llama, _quantized = torch.ops.llama, torch.ops.quantized_decomposed


def empty(kv: KVLayout) -> Buffers:
    """Of one layer: keys and values [1, C, G, D]; in int8 with a zero, int8, and a scale for each of their heads."""
    slots = (1, kv.room, kv.kv_heads)
    buffers = {f"{kind}_cache": torch.zeros(*slots, kv.head_dim, dtype=_DTYPES[kv.dtype]) for kind in ("key", "value")}
    if kv.dtype == "int8":
        for kind in ("key", "value"):
            buffers[f"{kind}_zeros"] = torch.zeros(*slots, 1, dtype=torch.int8)
            buffers[f"{kind}_scales"] = torch.zeros(*slots, 1)
    return buffers


class Place(NamedTuple):
    """Where the new tokens go, and what they see.

    Without `slots` they take the slots start…start+S-1, and row r sees slots 0…start+r, thus never one that was not
    written. With `slots` int64 [1, S] they take those, and row r sees where its row in `mask` float32 [S, C] is zero.
    """

    start: int
    slots: Tensor | None = None
    mask: Tensor | None = None

    def write(self, new: Tensor, buffer: Tensor) -> None:
        if self.slots is None:
            _llama.update_cache(new, buffer, self.start)
        else:
            _llama.update_cache_with_indices(new, buffer, 0, self.slots)

    @property
    def seen(self) -> tuple[int, Tensor | None, float, bool]:
        """What the operators take: start, mask, dropout, causal. With a mask the start says nothing."""
        return (self.start, None, 0.0, True) if self.mask is None else (0, self.mask, 0.0, False)


class Ring(nn.Module):
    """Slots of a window's cache: position p is in slot p mod C, until p + C takes its place."""

    def __init__(self, kv: KVLayout) -> None:
        super().__init__()
        assert kv.window is not None
        self.window, self.room = kv.window, kv.room
        self.positions, self.slots = nn.Buffer(torch.arange(kv.context_length)), nn.Buffer(torch.arange(kv.room))
        self.seen, self.unseen = nn.Buffer(torch.tensor(0.0)), nn.Buffer(torch.tensor(-torch.inf))

    def place(self, start: int, new: int) -> Place:
        """Of S new tokens, no more than the slots beyond the window and one."""
        rows = self.positions.narrow(0, start, new)
        newest = rows[-1:]
        held = newest - torch.remainder(newest - self.slots, self.room)  # position in each slot; below 0: none yet
        distance = rows[:, None] - held
        near = torch.logical_and(distance >= 0, distance < self.window)
        mask = torch.where(torch.logical_and(near, held >= 0), self.seen, self.unseen)
        return Place(start, torch.remainder(rows, self.room)[None], mask)


def attention(dtype: str) -> Callable[[Buffers, Tensor, Tensor, Tensor, Place], Tensor]:
    """(buffers, q [1, S, H, D], k, v [1, S, G, D], place) → float32 [1, S, H, D], for a cache of that type."""
    return {"float32": _float32, "bfloat16": _bfloat16, "int8": _int8}[dtype]


def _float32(buffers: Buffers, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
    keys, values = buffers["key_cache"], buffers["value_cache"]
    place.write(k, keys)
    place.write(v, values)
    out: Tensor = _llama.custom_sdpa(q, keys, values, *place.seen)
    return out


def _bfloat16(buffers: Buffers, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
    """The operator takes query and caches of one type."""
    q, k, v = (torch.ops.aten._to_copy(x, dtype=torch.bfloat16) for x in (q, k, v))
    out: Tensor = torch.ops.aten._to_copy(_float32(buffers, q, k, v, place), dtype=torch.float32)
    return out


def _int8(buffers: Buffers, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
    """The operator takes all three in int8; it wants zeros before scales."""
    operands = []
    for kind, x in (("key", k), ("value", v)):
        names = (f"{kind}_cache", f"{kind}_zeros", f"{kind}_scales")
        for name, part in zip(names, quantize(x), strict=True):
            place.write(part, buffers[name])
        operands.append([buffers[name] for name in names])
    (keys, *key_zeros_scales), (values, *value_zeros_scales) = operands
    query, *query_zeros_scales = quantize(q)
    out: Tensor = _llama.custom_quantized_sdpa(
        query, keys, values, *place.seen, None, *query_zeros_scales, *key_zeros_scales, *value_zeros_scales
    )
    return out


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [1, S, H, D] → int8; zeros int8 and scales float32, [1, S, H, 1]: one of each per position and head."""
    scale, zero = _quantized.choose_qparams_per_token_asymmetric.default(x, torch.int8)  # float64 and int64
    q = _quantized.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    to = torch.ops.aten._to_copy
    return q, to(zero, dtype=torch.int8), to(scale, dtype=torch.float32)
