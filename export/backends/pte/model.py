"""Llama 3.2 in the form XNNPACK runs best: cache in mutable buffers, few delegate breaks, shared activation scales.

Computes what `export.model` computes; a test compares the two in eager mode. Three rewrites keep a whole layer in
two delegates (only the cache update and attention are custom ops between them): the mean of RMSNorm is a linear with
constant weights 1/n, the half-rotation of RoPE a linear with a ±1 permutation, and the int8 activation of a norm is
quantized once for q, k, v (gate, up) instead of once for each.

Shapes: S new tokens, C context length, H query heads, G key/value heads, D head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from ...model import rope_tables
from ...plan import ROTATE_IN, ROTATE_OUT, Architecture

ReadWeight = Callable[[str], Tensor]


def quantize_activation(x: Tensor) -> Tensor:
    """Int8 asymmetric per token, there and back: the pattern XNNPACK reads as a dynamically quantized input."""
    ops, block = torch.ops.torchao, [1] * (x.dim() - 1) + [x.shape[-1]]
    scale, zero = ops.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, -128, 127, None, None, torch.int8)
    q = ops.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
    out: Tensor = ops.dequantize_affine(q, block, scale, zero, torch.int8, -128, 127)
    return out


class QuantizedLinear(nn.Module):
    """Integer weights; the input has been through `quantize_activation`."""

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bits: int) -> None:
        super().__init__()
        self.qdata = nn.Buffer(weight.qdata)  # int8 [N, K]
        self.scale = nn.Buffer(weight.scale)  # float32 [N, K/group]
        self.zero = nn.Buffer(weight.zero_point)  # int8, all 0
        self.block = list(weight.block_size)
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.torchao.dequantize_affine(
            self.qdata, self.block, self.scale, self.zero, torch.int8, self.low, self.high
        )
        return F.linear(x, weight)


class FloatLinear(nn.Module):
    """float32 weights."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def linear(*weights: Tensor) -> nn.Module:
    """A linear of the kind its weight asks for; several weights are one linear with their rows one after another."""
    first = weights[0]
    if not isinstance(first, IntxUnpackedToInt8Tensor):
        return FloatLinear(torch.cat(weights))
    return QuantizedLinear(first, 4 if first.target_dtype == torch.int4 else 8)  # type: ignore[attr-defined]


class Embedding(nn.Module):
    """Token table: int8 per row through `embedding_byte` (exact), or float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.quantized = isinstance(weight, IntxUnpackedToInt8Tensor)
        if isinstance(weight, IntxUnpackedToInt8Tensor):
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
    """Turns the residual stream, or turns it back before the head."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(quantize_activation(x) if isinstance(self.linear, QuantizedLinear) else x)
        return out


class Constants(nn.Module):
    """Tensors every layer shares: RoPE tables, the rotation permutation, the averaging row."""

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
        return x * torch.rsqrt(F.linear(x * x, self.average, self.eps)) * weight

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + F.linear(x, self.rotation) * sin


class Layer(nn.Module):
    """One block; keys and values live in its own buffers [1, C, G, D]."""

    def __init__(self, read: ReadWeight, index: int, a: Architecture, context_length: int) -> None:
        super().__init__()
        prefix = f"model.layers.{index}."
        self.q, self.k, self.v, self.o = (linear(read(f"{prefix}self_attn.{p}_proj.weight")) for p in "qkvo")
        self.gate, self.up, self.down = (linear(read(f"{prefix}mlp.{p}_proj.weight")) for p in ("gate", "up", "down"))
        self.norm_1 = nn.Buffer(read(f"{prefix}input_layernorm.weight"))
        self.norm_2 = nn.Buffer(read(f"{prefix}post_attention_layernorm.weight"))
        shape = (1, context_length, a.num_key_value_heads, a.head_dim)
        self.key_cache = nn.Buffer(torch.zeros(shape), persistent=False)
        self.value_cache = nn.Buffer(torch.zeros(shape), persistent=False)
        self.heads, self.kv_heads, self.head_dim = a.num_attention_heads, a.num_key_value_heads, a.head_dim
        self.last = index == a.num_hidden_layers - 1

    def forward(self, x: Tensor, start: int, cos: Tensor, sin: Tensor, c: Constants) -> Tensor:
        h = self.activation(c.normalize(x, self.norm_1))
        # The partitioner joins neighbours in one backward sweep: projections that share an input must stand next to
        # each other, before anything that uses one of them. And XNNPACK reshapes to at most one dynamic dimension.
        q, k, v = self.q(h), self.k(h), self.v(h)
        q = q.view(1, -1, self.heads, self.head_dim)
        k, v = (x.view(1, -1, self.kv_heads, self.head_dim) for x in (k, v))
        q, k = c.rotate(q, cos, sin), c.rotate(k, cos, sin)
        torch.ops.llama.update_cache(k, self.key_cache, start)
        torch.ops.llama.update_cache(v, self.value_cache, start)
        attended = torch.ops.llama.custom_sdpa(q, self.key_cache, self.value_cache, start, None, 0.0, True)
        attended = attended.view(1, -1, self.heads * self.head_dim)
        if self.last:  # nothing after the last cache needs the other positions
            x, attended = x[:, -1:], attended[:, -1:]
        x = x + self.o(self.activation(attended))
        h = self.activation(c.normalize(x, self.norm_2))
        gate, up = self.gate(h), self.up(h)
        out: Tensor = x + self.down(self.activation(gate * torch.sigmoid(gate) * up))
        return out

    def activation(self, x: Tensor) -> Tensor:
        return quantize_activation(x) if isinstance(self.o, QuantizedLinear) else x


class PteLlama(nn.Module):
    """tokens int64 [1, S], input_pos int64 [1] → logits float32 [1, 1, V] after the last token."""

    def __init__(self, read: ReadWeight, a: Architecture, context_length: int) -> None:
        super().__init__()
        self.embedding = Embedding(read("model.embed_tokens.weight"))
        self.layers = nn.ModuleList(Layer(read, i, a, context_length) for i in range(a.num_hidden_layers))
        self.norm = nn.Buffer(read("model.norm.weight"))
        self.rotate_in, self.rotate_out = (
            Rotation(read(name)) if a.rotated else nn.Identity() for name in (ROTATE_IN, ROTATE_OUT)
        )
        self.head = linear(read("lm_head.weight"))
        self.constants = Constants(a, context_length)
        self.context_length = context_length

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        start: Any = input_pos[0].item()  # a symbol while tracing
        new = tokens.shape[1]
        torch._check(start >= 0)  # type: ignore[no-untyped-call]
        torch._check(start < self.context_length)  # type: ignore[no-untyped-call]
        c = self.constants
        cos = c.cos.narrow(0, start, new)[None, :, None]  # [1, S, 1, D]
        sin = c.sin.narrow(0, start, new)[None, :, None]
        x = self.rotate_in(self.embedding(tokens))
        for layer in self.layers:
            x = layer(x, start, cos, sin, c)
        x = self.rotate_out(c.normalize(x, self.norm))
        out: Tensor = self.head(quantize_activation(x) if isinstance(self.head, QuantizedLinear) else x)
        return out
