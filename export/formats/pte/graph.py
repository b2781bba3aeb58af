"""Llama 3.2 in the form XNNPACK runs best: cache in mutable buffers, few delegate breaks, shared activation scales.

It computes the same as `export.model`; a test compares the two in eager mode. Three rewrites leave a whole layer in
two delegates, with only the cache update and attention, which are custom ops, between them: the mean of RMSNorm is a
linear with constant weights 1/n, the half-rotation of RoPE a linear with a ±1 permutation, and the int8 activation of
a norm is quantized once for q, k, v (gate, up) instead of once for each.

Shapes: S new tokens, C context length, H query heads, G key/value heads, D head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.architecture import EMBEDDING, FINAL_NORM, HEAD, ROTATE_IN, ROTATE_OUT, Architecture
from export.checkpoints.integers import Integers
from export.manifest import KVLayout
from export.model import rope_tables

from . import cache

_ReadWeight = Callable[[str], Any]
"""Name → float32 tensor, or the integers of a quantized weight."""


def _quantize_activation(x: Tensor) -> Tensor:
    """Round to int8, asymmetric per token, and dequantize: XNNPACK's pattern of a dynamically quantized input."""
    ops, block = torch.ops.torchao, [1] * (x.dim() - 1) + [x.shape[-1]]
    scale, zero = ops.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, -128, 127, None, None, torch.int8)
    q = ops.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
    out: Tensor = ops.dequantize_affine(q, block, scale, zero, torch.int8, -128, 127)
    return out


class QuantizedLinear(nn.Module):
    """Integer weights; the caller passes the input through `_quantize_activation`."""

    def __init__(self, weight: Integers) -> None:
        super().__init__()
        self.qdata = nn.Buffer(weight.qdata)  # int8 [N, K]
        self.scale = nn.Buffer(weight.scale)  # float32 [N, K/group]
        self.zero = nn.Buffer(torch.zeros_like(weight.scale, dtype=torch.int8))
        self.block = [1, weight.group_size]
        self.low, self.high = -(2 ** (weight.bits - 1)), 2 ** (weight.bits - 1) - 1

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.torchao.dequantize_affine(
            self.qdata, self.block, self.scale, self.zero, torch.int8, self.low, self.high
        )
        return F.linear(x, weight)


class FloatLinear(nn.Module):
    """float32 weights [N, K]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def _linear(weight: Tensor | Integers) -> nn.Module:
    return QuantizedLinear(weight) if isinstance(weight, Integers) else FloatLinear(weight)


class Embedding(nn.Module):
    """Token table: int8 per row through `embedding_byte` (exact), or float32."""

    def __init__(self, weight: Tensor | Integers) -> None:
        super().__init__()
        self.quantized = isinstance(weight, Integers)
        if isinstance(weight, Integers):
            self.qdata = nn.Buffer(weight.qdata)
            self.scale = nn.Buffer(weight.scale[:, 0] if weight.scale.shape[1] == 1 else weight.scale)
        else:
            self.weight = nn.Buffer(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.quantized:
            return F.embedding(tokens, self.weight)
        out: Tensor = torch.ops.quantized_decomposed.embedding_byte.dtype(
            self.qdata, self.scale, None, -128, 127, tokens, dtype=torch.float32
        )
        return out


class Rotation(nn.Module):
    """Rotates the residual stream, or rotates it back before the head."""

    def __init__(self, weight: Tensor | Integers) -> None:
        super().__init__()
        self.linear = _linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(_quantize_activation(x) if isinstance(self.linear, QuantizedLinear) else x)
        return out


class Constants(nn.Module):
    """Tensors that all layers share: RoPE tables, the rotation permutation, the averaging row."""

    def __init__(self, a: Architecture, context_length: int) -> None:
        super().__init__()
        cos, sin = rope_tables(a, context_length)
        half = a.head_dim // 2
        rotation = torch.zeros(a.head_dim, a.head_dim)  # (first, second) → (−second, first)
        rotation[range(half), range(half, a.head_dim)] = -1.0
        rotation[range(half, a.head_dim), range(half)] = 1.0
        self.cos, self.sin = nn.Buffer(torch.cat([cos, cos], 1)), nn.Buffer(torch.cat([sin, sin], 1))  # [C, D]
        self.rotation = nn.Buffer(rotation)
        self.average = nn.Buffer(torch.full((1, a.hidden_size), 1.0 / a.hidden_size))
        self.eps = nn.Buffer(torch.tensor([a.rms_norm_eps]))

    def normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        # mean(x²) + eps is one linear: weights 1/n, bias eps
        return x * torch.rsqrt(F.linear(x * x, self.average, self.eps)) * weight

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + F.linear(x, self.rotation) * sin


class Layer(nn.Module):
    """One block with its keys and values."""

    def __init__(self, read: _ReadWeight, index: int, a: Architecture, kv: KVLayout) -> None:
        super().__init__()
        prefix = f"model.layers.{index}."
        self.q, self.k, self.v, self.o = (_linear(read(f"{prefix}self_attn.{p}_proj.weight")) for p in "qkvo")
        self.gate, self.up, self.down = (_linear(read(f"{prefix}mlp.{p}_proj.weight")) for p in ("gate", "up", "down"))
        self.norm_1 = nn.Buffer(read(f"{prefix}input_layernorm.weight"))
        self.norm_2 = nn.Buffer(read(f"{prefix}post_attention_layernorm.weight"))
        self.attend, self.slots = cache.attention(kv.dtype), tuple(buffers := cache.empty(kv))
        for name, buffer in buffers.items():
            setattr(self, name, nn.Buffer(buffer, persistent=False))
        self.heads, self.kv_heads, self.head_dim = a.num_attention_heads, a.num_key_value_heads, a.head_dim
        self.last = index == a.num_hidden_layers - 1

    def forward(self, x: Tensor, place: cache.Place, cos: Tensor, sin: Tensor, c: Constants) -> Tensor:
        h = self.activation(c.normalize(x, self.norm_1))
        # The partitioner joins neighbours in one backward sweep: projections that share an input must be adjacent,
        # before any op that uses one of them. And XNNPACK reshapes to at most one dynamic dimension.
        q, k, v = self.q(h), self.k(h), self.v(h)
        q = q.view(1, -1, self.heads, self.head_dim)
        k, v = (x.view(1, -1, self.kv_heads, self.head_dim) for x in (k, v))
        q, k = c.rotate(q, cos, sin), c.rotate(k, cos, sin)
        attended = self.attend({name: getattr(self, name) for name in self.slots}, q, k, v, place)
        attended = attended.view(1, -1, self.heads * self.head_dim)
        if self.last:  # nothing after the last cache needs the other positions
            x, attended = x[:, -1:], attended[:, -1:]
        x = x + self.o(self.activation(attended))
        h = self.activation(c.normalize(x, self.norm_2))
        gate, up = self.gate(h), self.up(h)
        out: Tensor = x + self.down(self.activation(gate * torch.sigmoid(gate) * up))
        return out

    def activation(self, x: Tensor) -> Tensor:
        return _quantize_activation(x) if isinstance(self.o, QuantizedLinear) else x


class PteLlama(nn.Module):
    """tokens int64 [1, S], input_pos int64 [1] → logits float32 [1, 1, V] after the last token."""

    def __init__(self, read: _ReadWeight, a: Architecture, kv: KVLayout) -> None:
        super().__init__()
        self.embedding = Embedding(read(EMBEDDING))
        self.layers = nn.ModuleList(Layer(read, i, a, kv) for i in range(a.num_hidden_layers))
        self.norm = nn.Buffer(read(FINAL_NORM))
        self.rotate_in, self.rotate_out = (
            Rotation(read(name)) if a.rotated else nn.Identity() for name in (ROTATE_IN, ROTATE_OUT)
        )
        self.head = _linear(read(HEAD))
        self.constants = Constants(a, kv.context_length)
        self.context_length = kv.context_length
        self.ring = cache.Ring(kv) if kv.window else None

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        start: Any = input_pos[0].item()  # a symbol while tracing
        new = tokens.shape[1]
        torch._check(start >= 0)  # type: ignore[no-untyped-call]
        torch._check(start < self.context_length)  # type: ignore[no-untyped-call]
        c = self.constants
        cos = c.cos.narrow(0, start, new)[None, :, None]  # [1, S, 1, D]
        sin = c.sin.narrow(0, start, new)[None, :, None]
        x = self.rotate_in(self.embedding(tokens))
        place = self.ring.place(start, new) if self.ring else cache.Place(start)
        for layer in self.layers:
            x = layer(x, place, cos, sin, c)
        x = self.rotate_out(c.normalize(x, self.norm))
        out: Tensor = self.head(_quantize_activation(x) if isinstance(self.head, QuantizedLinear) else x)
        return out
