"""Keys and values of a layer as mutable buffers, and attention over them, by ExecuTorch's own operators.

Shapes: S new tokens, C context length, H query heads, G key/value heads, D head_dim.
"""

from collections.abc import Callable

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401  (registers the quantizing ones for programs)
import torch
from torch import Tensor
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  (registers its operators)

from export.manifest import KVLayout

Buffers = dict[str, Tensor]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_llama, _quantized = torch.ops.llama, torch.ops.quantized_decomposed


def empty(kv: KVLayout) -> Buffers:
    """Of one layer: keys and values [1, C, G, D]; in int8 with a zero, int8, and a scale for each of their heads."""
    slots = (1, kv.context_length, kv.kv_heads)
    buffers = {f"{kind}_cache": torch.zeros(*slots, kv.head_dim, dtype=_DTYPES[kv.dtype]) for kind in ("key", "value")}
    if kv.dtype == "int8":
        for kind in ("key", "value"):
            buffers[f"{kind}_zeros"] = torch.zeros(*slots, 1, dtype=torch.int8)
            buffers[f"{kind}_scales"] = torch.zeros(*slots, 1)
    return buffers


def attention(dtype: str) -> Callable[[Buffers, Tensor, Tensor, Tensor, int], Tensor]:
    """(buffers, q [1, S, H, D], k, v [1, S, G, D], start) → float32 [1, S, H, D], for a cache of that type.

    The new tokens take slots start…start+S-1. Attention is without a mask (None), without dropout, and causal from
    `start` on: row r sees slots 0…start+r, thus never a slot that was not written.
    """
    return {"float32": _float32, "bfloat16": _bfloat16, "int8": _int8}[dtype]


def _float32(buffers: Buffers, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    keys, values = buffers["key_cache"], buffers["value_cache"]
    _llama.update_cache(k, keys, start)
    _llama.update_cache(v, values, start)
    out: Tensor = _llama.custom_sdpa(q, keys, values, start, None, 0.0, True)
    return out


def _bfloat16(buffers: Buffers, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """The operator takes query and caches of one type."""
    q, k, v = (torch.ops.aten._to_copy(x, dtype=torch.bfloat16) for x in (q, k, v))
    out: Tensor = torch.ops.aten._to_copy(_float32(buffers, q, k, v, start), dtype=torch.float32)
    return out


def _int8(buffers: Buffers, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """The operator takes all three in int8; it wants zeros before scales."""
    operands = []
    for kind, x in (("key", k), ("value", v)):
        names = (f"{kind}_cache", f"{kind}_zeros", f"{kind}_scales")
        for name, part in zip(names, quantize(x), strict=True):
            _llama.update_cache(part, buffers[name], start)
        operands.append([buffers[name] for name in names])
    (keys, *key_zeros_scales), (values, *value_zeros_scales) = operands
    query, *query_zeros_scales = quantize(q)
    out: Tensor = _llama.custom_quantized_sdpa(
        query, keys, values, start, None, 0.0, True, None, *query_zeros_scales, *key_zeros_scales, *value_zeros_scales
    )
    return out


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [1, S, H, D] → int8; zeros int8 and scales float32, [1, S, H, 1]: one of each per position and head."""
    scale, zero = _quantized.choose_qparams_per_token_asymmetric.default(x, torch.int8)  # float64 and int64
    q = _quantized.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    to = torch.ops.aten._to_copy
    return q, to(zero, dtype=torch.int8), to(scale, dtype=torch.float32)
