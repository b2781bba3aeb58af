"""Each MIL operation in torch on the CPU, written from the op definitions in coremltools' documentation.

An op gets its inputs by parameter name and returns one tensor or several; the evaluator rounds them to the dtype the
program declares. Linears and attention accumulate in fp32 and are rounded once, at the end; Core ML may round inside
attention, in a different place on each device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = Mapping[str, Any]
"""Parameter → tensor, string, list of tensors, or absent."""
_Op = Callable[[Inputs], Tensor | tuple[Tensor, ...]]

_CAST_TYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int16": torch.int16,
    "uint16": torch.int32,  # as package.py reads it
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


_INTEGERS = frozenset({
    "axes", "axis", "batch_dims", "begin", "begin_mask", "end", "end_mask", "exclusive", "interleave", "keep_dims",
    "num_splits", "perm", "reps", "reverse", "shape", "size", "split_sizes", "squeeze_mask", "stride", "transpose_x",
    "transpose_y",
})  # fmt: skip
"""Parameters that are read as integers, never as tensors."""
_BLOCK_BYTES = 2**22
"""Of a weight: so much of it stays in a core's caches."""


def settled(parameter: str, values: list[Any]) -> Any:
    """The constant value of a parameter, in the form in which operations read it."""
    if parameter == "values":
        return values
    (value,) = values
    return _listed(value) if parameter in _INTEGERS and isinstance(value, Tensor) else value


def _listed(value: Tensor) -> list[int]:
    return [int(number) for number in value.flatten().tolist()]


def _integers(inputs: Inputs, name: str, default: list[int]) -> list[int]:
    value = inputs.get(name)
    if value is None:
        return default
    return _listed(value) if isinstance(value, Tensor) else value


def _integer(inputs: Inputs, name: str, default: int) -> int:
    return _integers(inputs, name, [default])[0]


def _require(inputs: Inputs, name: str, allowed: int) -> None:
    """Refuse an option that is not implemented here."""
    if _integer(inputs, name, allowed) != allowed:
        raise ValueError(f"{name}={inputs[name]} is not evaluated here")


def dequantize(inputs: Inputs) -> Tensor:
    """constexpr_blockwise_shift_scale: scale · (data - offset) in the scale's dtype; the shapes give the blocks."""
    data, scale, offset = inputs["data"], inputs["scale"], inputs.get("offset")
    if offset is not None:
        data = data.to(scale.dtype) - _expand(offset.to(scale.dtype), data.shape)
    product: Tensor = data.to(scale.dtype) * _expand(scale, data.shape)
    return product


def _expand(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Repeat each entry over its block."""
    for axis, (count, size) in enumerate(zip(blocks.shape, shape, strict=True)):
        blocks = blocks.repeat_interleave(size // count, dim=axis)
    return blocks


def _linear(inputs: Inputs) -> Tensor:
    """x · weightᵀ + bias; the weight's dtype decides the kernel, and either accumulates in fp32 (see evaluator)."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def linear_each(runs: Sequence[Inputs]) -> list[Tensor]:
    """The linear of several runs: where each has one row, which memory holds up, block by block of their weight.

    A row's products are summed as for itself alone; those of several rows at once would be summed in another order.
    """
    weight, bias = runs[0]["weight"], runs[0].get("bias")
    rows = max(1, _BLOCK_BYTES // (weight.element_size() * weight.shape[-1]))
    if len(runs) == 1 or len(weight) <= rows or any(run["x"].shape[:-1].numel() > 1 for run in runs):
        return [_linear(run) for run in runs]
    weights = weight.split(rows)
    biases = [None] * len(weights) if bias is None else bias.split(rows)
    parts = [
        [_linear({"x": run["x"], "weight": part, "bias": its_bias}) for run in runs]
        for part, its_bias in zip(weights, biases, strict=True)
    ]
    return [torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True)]


def _matmul(inputs: Inputs) -> Tensor:
    """x · y, each optionally transposed."""
    x, y = inputs["x"].float(), inputs["y"].float()
    x = x.transpose(-1, -2) if _integer(inputs, "transpose_x", 0) else x
    y = y.transpose(-1, -2) if _integer(inputs, "transpose_y", 0) else y
    product: Tensor = x @ y
    return product


def _attention(inputs: Inputs) -> Tensor:
    """softmax(q·kᵀ/√E + mask)·v; in a bool mask, True takes part."""
    mask = inputs.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    query, key, value = (inputs[name].float() for name in ("query", "key", "value"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1 / math.sqrt(query.shape[-1]))


def _gather(inputs: Inputs) -> Tensor:
    """Slices of x at indices along an axis; negative indices count from the end."""
    _require(inputs, "batch_dims", 0)
    x, indices = inputs["x"], inputs["indices"].long()
    axis = _integer(inputs, "axis", 0) % x.dim()
    size = x.shape[axis]
    if bool(((indices < -size) | (indices >= size)).any()):
        raise IndexError(f"gather index outside 0…{size - 1}")
    taken: Tensor = x.index_select(axis, (indices % size).flatten())
    return taken.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _region(inputs: Inputs, shape: torch.Size) -> tuple[slice | int, ...]:
    """The index that begin, end, stride and the three masks describe. Raises IndexError outside the shape."""
    rank = len(shape)
    begin, end = _integers(inputs, "begin", []), _integers(inputs, "end", [])
    stride = _integers(inputs, "stride", [1] * rank)
    open_begin, open_end, squeeze = (
        _integers(inputs, name, [0] * rank) for name in ("begin_mask", "end_mask", "squeeze_mask")
    )
    index: list[slice | int] = []
    for i, size in enumerate(shape):
        first = 0 if open_begin[i] else begin[i] + size * (begin[i] < 0)
        last = size if open_end[i] else end[i] + size * (end[i] < 0)
        if stride[i] < 1 or not 0 <= first < size or (not squeeze[i] and not first < last <= size):
            raise IndexError(f"slice {begin[i]}:{end[i]}:{stride[i]} of dimension {i}, which has {size}")
        index.append(first if squeeze[i] else slice(first, last, stride[i]))
    return tuple(index)


def _slice_by_index(inputs: Inputs) -> Tensor:
    """A region of x, copied, since x may be a state that is written later."""
    taken: Tensor = inputs["x"][_region(inputs, inputs["x"].shape)]
    return taken.clone()


def _slice_by_size(inputs: Inputs) -> Tensor:
    """`size` elements from `begin`; -1: to the end."""
    x: Tensor = inputs["x"]
    for axis, (first, size) in enumerate(
        zip(_integers(inputs, "begin", []), _integers(inputs, "size", []), strict=True)
    ):
        x = x.narrow(axis, first, x.shape[axis] - first if size == -1 else size)
    return x


def _slice_update(inputs: Inputs) -> Tensor:
    """A copy of x with a region replaced."""
    return slice_assign({**inputs, "x": inputs["x"].clone()})


def slice_assign(inputs: Inputs) -> Tensor:
    """slice_update into x itself, used by the evaluator where no result can differ."""
    x: Tensor = inputs["x"]
    index, update = _region(inputs, x.shape), inputs["update"]
    if x[index].shape != update.shape:
        raise ValueError(f"update of shape {tuple(update.shape)} for a region of shape {tuple(x[index].shape)}")
    x[index] = update
    return x


def _reshape(inputs: Inputs) -> Tensor:
    """0 in `shape` keeps a dimension, -1 takes the remaining elements."""
    x: Tensor = inputs["x"]
    shape = _integers(inputs, "shape", [])
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def _split(inputs: Inputs) -> tuple[Tensor, ...]:
    """Equal parts, or parts of given sizes."""
    x: Tensor = inputs["x"]
    axis = _integer(inputs, "axis", 0)
    count = _integer(inputs, "num_splits", 1)
    sizes = _integers(inputs, "split_sizes", [x.shape[axis] // count] * count)
    return torch.functional.split(x, sizes, dim=axis)


def _concat(inputs: Inputs) -> Tensor:
    """Values joined along an axis; scalars count as vectors of one element."""
    _require(inputs, "interleave", 0)
    values = [value.reshape(1) if value.dim() == 0 else value for value in inputs["values"]]
    return torch.cat(values, dim=_integer(inputs, "axis", 0))


def _reduce_mean(inputs: Inputs) -> Tensor:
    """Mean over axes."""
    x: Tensor = inputs["x"]
    axes = _integers(inputs, "axes", list(range(x.dim())))
    return x.float().mean(axes, keepdim=bool(_integer(inputs, "keep_dims", 0)))


def _cumsum(inputs: Inputs) -> Tensor:
    """Sums along an axis up to and with each element."""
    _require(inputs, "exclusive", 0)
    _require(inputs, "reverse", 0)
    x: Tensor = inputs["x"]
    return x.cumsum(_integer(inputs, "axis", 0))


def _rsqrt(inputs: Inputs) -> Tensor:
    """1 / √(x + epsilon)."""
    return torch.rsqrt(inputs["x"] + inputs["epsilon"])


def _expand_dims(inputs: Inputs) -> Tensor:
    """New dimensions of size 1, at the axes of the result."""
    x: Tensor = inputs["x"]
    axes = _integers(inputs, "axes", [])
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(inputs: Inputs) -> Tensor:
    """Drop dimensions of size 1."""
    x: Tensor = inputs["x"]
    axes = _integers(inputs, "axes", [i for i, size in enumerate(x.shape) if size == 1])
    return x.squeeze(tuple(axes))


OPS: dict[str, _Op] = {
    "abs": lambda i: i["x"].abs(),
    "add": lambda i: i["x"] + i["y"],
    "cast": lambda i: i["x"].to(_CAST_TYPES[i["dtype"]]),
    "clip": lambda i: i["x"].clamp(i["alpha"], i["beta"]),
    "concat": _concat,
    "constexpr_blockwise_shift_scale": dequantize,
    "cumsum": _cumsum,
    "equal": lambda i: i["x"] == i["y"],
    "exp": lambda i: i["x"].exp(),
    "expand_dims": _expand_dims,
    "gather": _gather,
    "greater": lambda i: i["x"] > i["y"],
    "greater_equal": lambda i: i["x"] >= i["y"],
    "identity": lambda i: i["x"],
    "less": lambda i: i["x"] < i["y"],
    "linear": _linear,
    "logical_and": lambda i: i["x"] & i["y"],
    "logical_or": lambda i: i["x"] | i["y"],
    "matmul": _matmul,
    "maximum": lambda i: torch.maximum(i["x"], i["y"]),
    "minimum": lambda i: torch.minimum(i["x"], i["y"]),
    "mod": lambda i: i["x"] % i["y"],
    "mul": lambda i: i["x"] * i["y"],
    "real_div": lambda i: i["x"] / i["y"],
    "reduce_max": lambda i: i["x"].amax(_integers(i, "axes", []), keepdim=bool(_integer(i, "keep_dims", 0))),
    "reduce_mean": _reduce_mean,
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "scaled_dot_product_attention": _attention,
    "select": lambda i: torch.where(i["cond"], i["a"], i["b"]),
    "shape": lambda i: torch.tensor(i["x"].shape, dtype=torch.int32),
    "sigmoid": lambda i: i["x"].sigmoid(),
    "silu": lambda i: F.silu(i["x"]),
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "softmax": lambda i: i["x"].float().softmax(_integer(i, "axis", -1)),
    "split": _split,
    "sqrt": lambda i: i["x"].sqrt(),
    "square": lambda i: i["x"].square(),
    "squeeze": _squeeze,
    "sub": lambda i: i["x"] - i["y"],
    "tile": lambda i: i["x"].repeat(_integers(i, "reps", [])),
    "transpose": lambda i: i["x"].permute(_integers(i, "perm", [])),
}
