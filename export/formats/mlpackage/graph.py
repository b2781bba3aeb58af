"""Llama as a Core ML (MIL, iOS 18) program, authored op by op in fp16.

Authoring takes seconds where tracing and converting the PyTorch model takes minutes, and no pass chooses precisions.
Activations are fp16; where fp16 would overflow or lose the sum (RMSNorm), the program casts to fp32.

The convention is that of Apple's "On Device Llama 3.1 with Core ML" and of swift-transformers: the caller passes the
new tokens and an additive mask whose last dimension is the number of cache slots in use, so start = end - q. A step
writes keys and values of its tokens into slots start…end-1 of both states, then attends to slots 0…end-1.

With a window the states have C slots, fewer than there are positions, and the token of position p is in slot p mod C:
it leaves when that of p + C comes. The mask's last dimension counts positions then; what it holds is not read, since
the program knows what each token sees. All C slots are attended to; a call's tokens lie in slots one behind the other.

Shapes: q new tokens, e positions or slots in use after them, H query heads, G key/value heads, D head_dim, C slots.
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
from export.manifest import KVLayout
from export.model import rope_tables
from export.plan import Attention
from export.quantization.store import QuantizedModel

from . import cache_shape, mil_name

_FP16_LOWEST = np.float16(-65504)
_FP16_SMALLEST = np.finfo(np.float16).smallest_normal


@dataclass(frozen=True)
class _Step:
    """Values of the current call that all layers use."""

    start: Var
    """int32 [1]: slot of the first new token."""
    stop: Var
    """int32 [1]: the slot behind the last new token."""
    end: Var
    """int32 [1]: positions in use after this call."""
    used: Var
    """int32 [1]: slots that are attended to."""
    positions: Var
    """int32 [1, q]: those of the new tokens."""
    cos: Var
    """fp16 [1, q, D]"""
    sin: Var
    """fp16 [1, q, D], the first half negated."""


@dataclass
class _Caches:
    """Both states and their values after the last write; the only object that changes while authoring."""

    states: tuple[Var, Var]
    values: tuple[Var, Var]
    """fp16 [layers, 1, G, C, D] each."""


def author(model: QuantizedModel, kv: KVLayout, attention: Attention) -> Program:
    """The whole program with its weights, each of which is read once."""
    program = Program()
    with Function(_interface(kv), opset_version=ct.target.iOS18) as function:
        function.set_outputs([_decoder(model, function.inputs, kv, attention)])
    program.add_function("main", function)
    return program


def _interface(kv: KVLayout) -> dict[str, Var]:
    """Inputs `inputIds` int32 [1, q], `causalMask` fp16 [1, 1, q, e]; states fp16 [layers, 1, G, C, D]."""
    new, end = get_new_symbol(), get_new_symbol()
    return {
        "inputIds": mb.placeholder((1, new), types.int32),
        "causalMask": mb.placeholder((1, 1, new, end), types.fp16),
        "keyCache": mb.state_tensor_placeholder(cache_shape(kv), types.fp16),
        "valueCache": mb.state_tensor_placeholder(cache_shape(kv), types.fp16),
    }


def _decoder(model: QuantizedModel, inputs: dict[str, Var], kv: KVLayout, attention: Attention) -> Var:
    """Logits fp16 [1, q, V] of every new position."""
    attend = {"fused": _fused, "plain": _plain}[attention]
    a = model.architecture
    states = (inputs["keyCache"], inputs["valueCache"])
    caches = _Caches(states, (mb.read_state(input=states[0]), mb.read_state(input=states[1])))
    step = _prepare(a, inputs["inputIds"], inputs["causalMask"], kv)
    table = _weight(model, (EMBEDDING,))
    x = mb.gather(
        x=table, indices=inputs["inputIds"], axis=0, batch_dims=0, validate_indices=False, name=mil_name((EMBEDDING,))
    )
    if a.rotated:
        x = _linear(model, x, (ROTATE_IN,))
    for i in track(range(a.num_hidden_layers), "author", a.num_hidden_layers):
        prefix = f"model.layers.{i}."
        normed = rms_norm(model, x, f"{prefix}input_layernorm.weight")
        queries = _project(model, normed, i, step, caches)
        keys, values = (_slots(cache, i, step.used) for cache in caches.values)
        if i == 0:  # behind the first write: a state that is read before it is written may be copied as a whole
            bias = _attention_bias(a, inputs["causalMask"], step, keys, kv)
        x = mb.add(x=x, y=_attention(model, attend(queries, keys, values, bias), i))
        normed = rms_norm(model, x, f"{prefix}post_attention_layernorm.weight")
        x = mb.add(x=x, y=_swiglu(model, normed, prefix))
    x = rms_norm(model, x, FINAL_NORM)
    if a.rotated:
        x = _linear(model, x, (ROTATE_OUT,))
    # a tied head is the same variable as the embedding, so that the file holds one copy
    head = table if a.tie_word_embeddings else _weight(model, (HEAD,))
    return mb.linear(x=x, weight=head, name="logits")


def _prepare(a: Architecture, ids: Var, mask: Var, kv: KVLayout) -> _Step:
    """Slots and rotary tables of this call.

    Lengths are those of inputs, never of a slice between two computed slots: off the CPU, Core ML has refused such
    shapes as data-dependent.
    """
    new = mb.slice_by_size(x=mb.shape(x=ids), begin=[1], size=[1])
    end = mb.slice_by_size(x=mb.shape(x=mask), begin=[3], size=[1], name="end")
    start = mb.sub(x=end, y=new, name="start")
    slot = mb.mod(x=start, y=np.int32(kv.room), name="slot") if kv.slots else start
    counted = mb.cumsum(x=mb.cast(x=mb.equal(x=ids, y=ids), dtype="int32"), axis=1)  # 1…q
    positions = mb.add(x=counted, y=mb.sub(x=start, y=np.int32(1)), name="positions")
    cos, sin = (table.numpy() for table in rope_tables(a, kv.context_length))
    return _Step(
        start=slot,
        stop=mb.add(x=slot, y=new, name="stop") if kv.slots else end,
        end=end,
        used=mb.const(val=np.array([kv.slots], np.int32), name="used") if kv.slots else end,
        positions=positions,
        cos=_rows(np.concatenate([cos, cos], axis=1), positions, "cos"),
        sin=_rows(np.concatenate([-sin, sin], axis=1), positions, "sin"),
    )


def _rows(table: NDArray[np.floating[Any]], positions: Var, name: str) -> Var:
    """Rows of a constant [C, D] at positions [1, q], in fp16: [1, q, D]."""
    stored = mb.const(val=table.astype(np.float16), name=f"{name}_table")
    return mb.gather(x=stored, indices=positions, axis=0, batch_dims=0, validate_indices=False, name=name)


def _attention_bias(a: Architecture, mask: Var, step: _Step, keys: Var, kv: KVLayout) -> Var:
    """The caller's mask with later slots and an empty first one hidden; repeated for a group's heads: [1, 1, H/G·q, e].

    With a window also what has left it. Slots that go round have no mask of the caller's: [1, 1, H/G·q, C].

    swift-transformers passes zeros of shape [1, 1, 1, e] even for a prompt, with e one more than there are tokens:
    its first token lands in slot 1. So the program is causal by itself, and slot 0 is hidden where it was never
    written: where the used slots `keys` [1, G, e, D] of layer 0 begin with zeros. Rotary embedding depends on
    differences of positions only, so the shift by one does not matter.
    """
    columns = _positions_of_slots(step, kv)
    queries = mb.expand_dims(x=mb.cast(x=step.positions, dtype="fp32"), axes=[2])  # [1, q, 1]
    first = mb.slice_by_size(x=keys, begin=[0, 0, 0, 0], size=[-1, -1, 1, -1])
    empty = mb.cast(x=_is_zero(first), dtype="fp32")  # [1, 1, 1, 1]
    # Differences of slots cut to 0…1: no comparison of the mask's size in integers, which Core ML may leave to the CPU.
    # fp32 holds every slot exactly, fp16 none beyond 2048.
    later = mb.clip(x=mb.sub(x=columns, y=queries), alpha=np.float32(0), beta=np.float32(1))  # [1, q, e]
    earlier = mb.clip(x=mb.sub(x=empty, y=columns), alpha=np.float32(0), beta=np.float32(1))  # [1, 1, 1, e]
    unseen = mb.maximum(x=later, y=earlier)
    if kv.window:
        left = mb.sub(x=queries, y=mb.add(x=columns, y=np.float32(kv.window - 1)))
        unseen = mb.maximum(x=unseen, y=mb.clip(x=left, alpha=np.float32(0), beta=np.float32(1)))
    # fp16's lowest number instead of -inf, since 0 · -inf is NaN; the minimum of two masks instead of their sum, which
    # could leave fp16's range
    hidden = mb.mul(x=mb.cast(x=unseen, dtype="fp16"), y=_FP16_LOWEST)
    bias = hidden if kv.slots else mb.minimum(x=mask, y=hidden)  # [1, 1, q, e]
    return mb.tile(x=bias, reps=[1, 1, a.num_attention_heads // a.num_key_value_heads, 1], name="attention_bias")


def _positions_of_slots(step: _Step, kv: KVLayout) -> Var:
    """fp32 [e]: slots are positions. Of C slots that go round fp32 [C]: those below 0 were never written."""
    if not kv.slots:
        slots = np.arange(kv.context_length, dtype=np.float32)
        return mb.slice_by_index(x=slots, begin=[0], end=step.end, name="key_slot")
    newest = mb.sub(x=step.end, y=np.int32(1))
    before = mb.sub(x=mb.add(x=newest, y=np.int32(kv.slots)), y=np.arange(kv.slots, dtype=np.int32))  # never negative
    return mb.cast(x=mb.sub(x=newest, y=mb.mod(x=before, y=np.int32(kv.slots))), dtype="fp32", name="key_position")


def _is_zero(keys: Var) -> Var:
    """Whether all groups' keys [1, G, s, D] of a slot are zero: bool [1, 1, s, 1]."""
    return mb.equal(x=mb.reduce_max(x=mb.abs(x=keys), axes=[1, 3], keep_dims=True), y=np.float16(0))


def _marked(keys: Var) -> Var:
    """Keys [1, G, q, D] as they are, and of a token whose keys are all zero one number that is not.

    A table's row of zeros has such keys, and must not pass for a slot that was never written. fp16's smallest normal
    number, which no GPU takes for zero, changes its scores by some 1e-4.
    """
    mark = np.zeros(keys.shape[3], np.float16)
    mark[0] = _FP16_SMALLEST
    return mb.add(x=keys, y=mb.mul(x=mb.cast(x=_is_zero(keys), dtype="fp16"), y=mark))


def _project(model: QuantizedModel, x: Var, layer: int, step: _Step, caches: _Caches) -> Var:
    """Queries [1, G, H/G·q, D] of x [1, q, hidden]; its keys and values are written into the caches.

    MIL's attention has no grouped queries: the heads of a group become more query rows of the one key head, which
    copies no keys. Row r of a group is head r // q, token r % q; the bias is repeated to match.
    """
    a, prefix = model.architecture, f"model.layers.{layer}."
    heads, groups, size = a.num_attention_heads, a.num_key_value_heads, a.head_dim
    qkv = _linear(model, x, tuple(f"{prefix}{name}.weight" for name in QKV))  # [1, q, (H+2G)·D]
    qkv = mb.transpose(x=mb.reshape(x=qkv, shape=[1, -1, heads + 2 * groups, size]), perm=[0, 2, 1, 3])
    # queries and keys are rotated by one set of ops
    qk, v = mb.split(x=qkv, split_sizes=[heads + groups, groups], axis=1)
    q, k = mb.split(x=_rotate(qk, step), split_sizes=[heads, groups], axis=1)
    _write(caches, layer, (k if layer else _marked(k), v), step)
    return mb.reshape(x=q, shape=[1, groups, -1, size])


def _attention(model: QuantizedModel, rows: Var, layer: int) -> Var:
    """What attention gave the query rows [1, G, H/G·q, D], projected: [1, q, hidden]."""
    a = model.architecture
    heads, size = a.num_attention_heads, a.head_dim
    out = mb.transpose(x=mb.reshape(x=rows, shape=[1, heads, -1, size]), perm=[0, 2, 1, 3])
    out = mb.reshape(x=out, shape=[1, -1, heads * size])
    return _linear(model, out, (f"model.layers.{layer}.self_attn.o_proj.weight",))


def _fused(queries: Var, keys: Var, values: Var, bias: Var) -> Var:
    """Attention of query rows [1, G, r, D] over e slots [1, G, e, D], as one operation."""
    return mb.scaled_dot_product_attention(query=queries, key=keys, value=values, attn_mask=bias)


def _plain(queries: Var, keys: Var, values: Var, bias: Var) -> Var:
    """The same as its parts, for systems whose fused operation is broken; scores and weights are rounded to fp16."""
    scale = np.float16(1 / np.sqrt(queries.shape[-1]))
    scores = mb.add(x=mb.matmul(x=mb.mul(x=queries, y=scale), y=keys, transpose_y=True), y=bias)
    return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=values)


def _rotate(x: Var, step: _Step) -> Var:
    """Rotary embedding of x [1, heads, q, D]: x·cos + (second half, first half)·sin with sin's first half negated."""
    first, second = mb.split(x=x, num_splits=2, axis=-1)
    swapped = mb.concat(values=[second, first], axis=-1)
    return mb.add(x=mb.mul(x=x, y=step.cos), y=mb.mul(x=swapped, y=step.sin))


def _write(caches: _Caches, layer: int, new: tuple[Var, Var], step: _Step) -> None:
    """Put new keys and values [1, G, q, D] into slots start…stop-1 of a layer, as coremltools' own front end does."""
    rest = np.array([0], np.int32)
    begin = mb.concat(values=[np.array([layer, 0, 0], np.int32), step.start, rest], axis=0)
    end = mb.concat(values=[np.array([layer + 1, 0, 0], np.int32), step.stop, rest], axis=0)
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


def _slots(cache: Var, layer: int, end: Var) -> Var:
    """Slots 0…end-1 of one layer: [1, G, end, D]."""
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
