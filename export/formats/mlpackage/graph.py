"""Llama as a Core ML (MIL, iOS 18) program, authored op by op in fp16.

Authoring takes seconds where tracing and converting the PyTorch model takes minutes, and no pass chooses precisions.
Activations are fp16; where fp16 would overflow or lose the sum (RMSNorm), the program casts to fp32.

The convention is that of Apple's "On Device Llama 3.1 with Core ML" and of swift-transformers: the caller passes the
new tokens and an additive mask whose last dimension is the number of cache slots in use, so start = end - q. A step
writes keys and values of its tokens into slots start…end-1 of both states, then attends to slots 0…end-1.

Shapes: q new tokens, e slots in use after them, H query heads, G key/value heads, D head_dim, C context length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - coremltools' own name for it
from coremltools.converters.mil.mil import Function, Program, Var, get_new_symbol, types
from numpy.typing import NDArray

from export.architecture import EMBEDDING, FINAL_NORM, GATE_UP, HEAD, QKV, ROTATE_IN, ROTATE_OUT, Architecture
from export.checkpoints.integers import Integers
from export.errors import ExportError
from export.host.console import track
from export.model import rope_tables
from export.quantization.store import QuantizedModel

_FP16_LOWEST = np.float16(-65504)


@dataclass(frozen=True)
class _Step:
    """Values of the current call that all layers use."""

    start: Var
    """int32 [1]: slot of the first new token."""
    end: Var
    """int32 [1]: slots in use after this call."""
    cos: Var
    """fp16 [q, D]"""
    sin: Var
    """fp16 [q, D], the first half negated."""
    bias: Var
    """fp16 [1, 1, H/G·q, e], added to attention scores."""


@dataclass
class _Caches:
    """Both states and their values after the last write; the only object that changes while authoring."""

    states: tuple[Var, Var]
    values: tuple[Var, Var]
    """fp16 [layers, 1, G, C, D] each."""


def author(model: QuantizedModel, context_length: int) -> Program:
    """The whole program with its weights, each of which is read once."""
    program = Program()
    with Function(_interface(model.architecture, context_length), opset_version=ct.target.iOS18) as function:
        function.set_outputs([_decoder(model, function.inputs)])
    program.add_function("main", function)
    return program


def _interface(a: Architecture, context_length: int) -> dict[str, Var]:
    """Inputs `inputIds` int32 [1, q], `causalMask` fp16 [1, 1, q, e]; states fp16 [layers, 1, G, C, D]."""
    new, end = get_new_symbol(), get_new_symbol()
    cache = (a.num_hidden_layers, 1, a.num_key_value_heads, context_length, a.head_dim)
    return {
        "inputIds": mb.placeholder((1, new), types.int32),
        "causalMask": mb.placeholder((1, 1, new, end), types.fp16),
        "keyCache": mb.state_tensor_placeholder(cache, types.fp16),
        "valueCache": mb.state_tensor_placeholder(cache, types.fp16),
    }


def _decoder(model: QuantizedModel, inputs: dict[str, Var]) -> Var:
    """Logits fp16 [1, q, V] of every new position."""
    a = model.architecture
    states = (inputs["keyCache"], inputs["valueCache"])
    caches = _Caches(states, (mb.read_state(input=states[0]), mb.read_state(input=states[1])))
    step = _prepare(a, inputs["inputIds"], inputs["causalMask"], caches.values[0])
    table = _weight(model, (EMBEDDING,))
    x = mb.gather(
        x=table, indices=inputs["inputIds"], axis=0, batch_dims=0, validate_indices=False, name=mil_name((EMBEDDING,))
    )
    if a.rotated:
        x = _linear(model, x, (ROTATE_IN,))
    for i in track(range(a.num_hidden_layers), "author", a.num_hidden_layers):
        prefix = f"model.layers.{i}."
        normed = rms_norm(model, x, f"{prefix}input_layernorm.weight")
        x = mb.add(x=x, y=_attention(model, normed, i, step, caches))
        normed = rms_norm(model, x, f"{prefix}post_attention_layernorm.weight")
        x = mb.add(x=x, y=_swiglu(model, normed, prefix))
    x = rms_norm(model, x, FINAL_NORM)
    if a.rotated:
        x = _linear(model, x, (ROTATE_OUT,))
    # a tied head is the same variable as the embedding, so that the file holds one copy
    head = table if a.tie_word_embeddings else _weight(model, (HEAD,))
    return mb.linear(x=x, weight=head, name="logits")


def _prepare(a: Architecture, ids: Var, mask: Var, keys: Var) -> _Step:
    """Positions, rotary tables and attention bias of this call; `keys` is the key state before this call."""
    new = mb.slice_by_size(x=mb.shape(x=ids), begin=[1], size=[1])
    end = mb.slice_by_size(x=mb.shape(x=mask), begin=[3], size=[1], name="end")
    start = mb.sub(x=end, y=new, name="start")
    cos, sin = (table.numpy() for table in rope_tables(a, keys.shape[3]))
    return _Step(
        start=start,
        end=end,
        cos=_rows(np.concatenate([cos, cos], axis=1).astype(np.float16), start, end, "cos"),
        sin=_rows(np.concatenate([-sin, sin], axis=1).astype(np.float16), start, end, "sin"),
        bias=_attention_bias(a, mask, keys, start, end),
    )


def _rows(table: NDArray[np.generic], start: Var, end: Var, name: str) -> Var:
    """Rows start…end-1 of a constant [C, n]."""
    zero, width = np.array([0], np.int32), np.array([table.shape[1]], np.int32)
    return mb.slice_by_index(
        x=mb.const(val=table, name=f"{name}_table"),
        begin=mb.concat(values=[start, zero], axis=0),
        end=mb.concat(values=[end, width], axis=0),
        name=name,
    )


def _attention_bias(a: Architecture, mask: Var, keys: Var, start: Var, end: Var) -> Var:
    """The caller's mask with later and empty slots hidden; repeated for the query heads of a group: [1, 1, H/G·q, e].

    swift-transformers passes zeros of shape [1, 1, 1, e] even for a prompt, with e one more than there are tokens:
    its first token lands in slot 1. So the program is causal by itself, and a slot before `start` that was never
    written (zeros in `keys`, the key state before this call) is hidden. Rotary embedding depends on differences of
    positions only, so the shift by one does not matter.
    """
    slots = np.arange(keys.shape[3], dtype=np.int32)
    queries = _rows(slots[:, None], start, end, "query_slot")  # [q, 1]
    one_row = mb.concat(values=[np.array([1], np.int32), end], axis=0)
    columns = mb.slice_by_index(x=slots[None, :], begin=[0, 0], end=one_row, name="key_slot")  # [1, e]
    later = mb.greater(x=columns, y=queries)  # [q, e]
    # One layer is enough: each call writes the same slots in all layers. The slots of this call's own tokens are still
    # empty in `keys`, therefore only those before `start` are judged by their contents.
    largest = mb.reduce_max(x=mb.abs(x=_used_slots(keys, 0, end)), axes=[0, 1, 3])  # [e]
    empty = mb.logical_and(x=mb.equal(x=largest, y=np.float16(0)), y=mb.less(x=columns, y=start))  # [1, e]
    # fp16's lowest number instead of -inf, since 0 · -inf is NaN; the minimum of two masks instead of their sum, which
    # could leave fp16's range
    hidden = mb.mul(x=mb.cast(x=mb.logical_or(x=later, y=empty), dtype="fp16"), y=_FP16_LOWEST)
    bias = mb.minimum(x=mask, y=hidden)  # [1, 1, q, e]
    return mb.tile(x=bias, reps=[1, 1, a.num_attention_heads // a.num_key_value_heads, 1], name="attention_bias")


def _attention(model: QuantizedModel, x: Var, layer: int, step: _Step, caches: _Caches) -> Var:
    """Grouped-query attention of x [1, q, hidden] over the cache, after its keys and values are written into it."""
    a, prefix = model.architecture, f"model.layers.{layer}."
    heads, groups, size = a.num_attention_heads, a.num_key_value_heads, a.head_dim
    qkv = _linear(model, x, tuple(f"{prefix}{name}.weight" for name in QKV))  # [1, q, (H+2G)·D]
    qkv = mb.transpose(x=mb.reshape(x=qkv, shape=[1, -1, heads + 2 * groups, size]), perm=[0, 2, 1, 3])
    # queries and keys are rotated by one set of ops
    qk, v = mb.split(x=qkv, split_sizes=[heads + groups, groups], axis=1)
    q, k = mb.split(x=_rotate(qk, step), split_sizes=[heads, groups], axis=1)
    _write(caches, layer, (k, v), step)
    keys, values = (_used_slots(cache, layer, step.end) for cache in caches.values)
    # MIL's attention has no grouped queries: the heads of a group become more query rows of the one key head,
    # which copies no keys. Row r of a group is head r // q, token r % q; the bias is repeated to match.
    q = mb.reshape(x=q, shape=[1, groups, -1, size])
    out = mb.scaled_dot_product_attention(query=q, key=keys, value=values, attn_mask=step.bias)
    out = mb.transpose(x=mb.reshape(x=out, shape=[1, heads, -1, size]), perm=[0, 2, 1, 3])
    out = mb.reshape(x=out, shape=[1, -1, heads * size])
    return _linear(model, out, (f"{prefix}self_attn.o_proj.weight",))


def _rotate(x: Var, step: _Step) -> Var:
    """Rotary embedding of x [1, heads, q, D]: x·cos + (second half, first half)·sin with sin's first half negated."""
    first, second = mb.split(x=x, num_splits=2, axis=-1)
    swapped = mb.concat(values=[second, first], axis=-1)
    return mb.add(x=mb.mul(x=x, y=step.cos), y=mb.mul(x=swapped, y=step.sin))


def _write(caches: _Caches, layer: int, new: tuple[Var, Var], step: _Step) -> None:
    """Put new keys and values [1, G, q, D] into slots start…end-1 of a layer, as coremltools' own front end does."""
    rest = np.array([0], np.int32)
    begin = mb.concat(values=[np.array([layer, 0, 0], np.int32), step.start, rest], axis=0)
    end = mb.concat(values=[np.array([layer + 1, 0, 0], np.int32), step.end, rest], axis=0)
    updated = []
    for state, value, update in zip(caches.states, caches.values, new, strict=True):
        changed = mb.slice_update(
            x=value,
            update=update,
            begin=begin,
            end=end,
            stride=[1] * 5,
            begin_mask=[False] * 5,
            end_mask=[False, True, True, False, True],
            squeeze_mask=[True, False, False, False, False],
        )
        updated.append(mb.coreml_update_state(state=state, value=changed))
    caches.values = (updated[0], updated[1])


def _used_slots(cache: Var, layer: int, end: Var) -> Var:
    """Slots 0…e-1 of one layer: [1, G, e, D]."""
    stop = mb.concat(values=[np.array([layer + 1, 0, 0], np.int32), end, np.array([0], np.int32)], axis=0)
    return mb.slice_by_index(
        x=cache,
        begin=[layer, 0, 0, 0, 0],
        end=stop,
        end_mask=[False, True, True, False, True],
        squeeze_mask=[True, False, False, False, False],
    )


def _swiglu(model: QuantizedModel, x: Var, prefix: str) -> Var:
    gate_up = _linear(model, x, tuple(f"{prefix}{name}.weight" for name in GATE_UP))
    gate, up = mb.split(x=gate_up, num_splits=2, axis=-1)
    return _linear(model, mb.mul(x=mb.silu(x=gate), y=up), (f"{prefix}mlp.down_proj.weight",))


def rms_norm(model: QuantizedModel, x: Var, name: str) -> Var:
    """x / rms(x) · weight of x [1, q, hidden], in fp32 between two casts.

    Residual streams of Llama models hold values in the hundreds and thousands; the square of anything above 255
    is infinite in fp16, and the norm would return zeros. A program of flexible shapes runs on CPU and GPU, where
    fp32 is native, so nothing is lost to the Neural Engine.
    """
    wide = mb.cast(x=x, dtype="fp32")
    mean = mb.reduce_mean(x=mb.square(x=wide), axes=[-1], keep_dims=True)
    inverse = mb.rsqrt(x=mean, epsilon=np.float32(model.architecture.rms_norm_eps))
    scale = mb.const(val=model.weights.read(name).to(torch.float32).numpy(), name=mil_name((name,)))
    return mb.cast(x=mb.mul(x=mb.mul(x=wide, y=inverse), y=scale), dtype="fp16")


def _linear(model: QuantizedModel, x: Var, names: tuple[str, ...]) -> Var:
    """Outputs of several weights side by side: one op if their schemes agree, else one op each and a concat."""
    if len({model.schemes.of(name) for name in names}) == 1:
        return mb.linear(x=x, weight=_weight(model, names), name=mil_name(names))
    return mb.concat(values=[_linear(model, x, (name,)) for name in names], axis=-1)


def _weight(model: QuantizedModel, names: tuple[str, ...]) -> Var:
    """The rows of these weights stacked: integers with their scales, or fp16 values."""
    parts: list[Any] = [model.read(name) for name in names]
    name = f"{mil_name(names)}_stored"
    if not isinstance(parts[0], Integers):
        return mb.const(val=half(torch.cat(parts), names, exact=False), name=name)
    integers = torch.cat([part.qdata for part in parts]).numpy()
    scales = half(torch.cat([part.scale for part in parts]), names, exact=True)
    if parts[0].bits == 4:
        # a view, since numpy considers the two dtypes equal and astype may keep int8, which is stored twice as large
        integers = integers.view(types.np_int4_dtype)
    return mb.constexpr_blockwise_shift_scale(data=integers, scale=scales, name=name)


def half(values: torch.Tensor, names: Sequence[str], *, exact: bool) -> NDArray[np.float16]:
    """Values as fp16. Raises ExportError: a value becomes infinite or, if `exact`, is rounded."""
    rounded = values.to(torch.float16)
    if not bool(rounded.isfinite().all()):
        raise ExportError(
            f"{names[0]}: a value exceeds fp16's 65504, which Core ML computes in; use another checkpoint"
        )
    if exact and not torch.equal(rounded.to(values.dtype), values):
        raise ExportError(f"{names[0]}: a scale is not exact in fp16; scales must be bf16 values of at least 2^-17")
    array: NDArray[np.float16] = rounded.numpy()
    return array


def mil_name(names: Sequence[str]) -> str:
    """A MIL identifier of one weight, or of several stacked: without dots, later names by their last part only."""
    first, *others = (name.removesuffix(".weight") for name in names)
    return "_".join([first.replace(".", "_"), *(name.rpartition(".")[2] for name in others)])
