"""Layer by layer over calibration text: what every linear reads, and its integers.

Words:
    full model       the checkpoint in float
    quantized model  the same, except that linears which are rounded already compute with their integers
    stream           the residual stream between layers, float32 [W, L, D]: W windows of L tokens, D hidden features
    sublayer         half of a layer: its norm, then attention or the MLP, whose result is added to the stream
    first linears    of a sublayer: read the normed stream (q, k, v; gate, up)
    last linear      of a sublayer: adds to the stream (o; down); it reads what lies `between` first and last
    chunk            a few windows that one thread computes at once
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from export.architecture import Architecture
from export.errors import ExportError
from export.model import Attention, Layer, rope_tables
from export.plan import Gptq, WeightScheme

from .gptq import Moments, round_linears
from .nearest import Rounded, round_at_best_scales
from .spread import blocks, crossed_moments, product, second_moments, spread

ReadWeight = Callable[[str], Tensor]
_WINDOWS_AT_ONCE = 2
_QUERIES = 64
"""Queries of a head that attend at once: few enough that memory for their scores is not asked of the system anew."""


def chunks(x: Tensor) -> Iterator[Tensor]:
    """Views of some windows at a time, of x [W, …]."""
    return iter(torch.split(x, _WINDOWS_AT_ONCE))


def load_layer(read: ReadWeight, a: Architecture, prefix: str) -> Layer:
    """One layer with the checkpoint's weights."""
    with torch.device("meta"):
        layer = Layer(a)
    for name, _ in list(layer.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, nn.Parameter(read(prefix + name), requires_grad=False))
    return layer


def linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear with its name within the layer."""
    return ((name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear))


class Seen(threading.local):
    """What a thread's last pass through a layer did."""

    def __init__(self) -> None:
        self.linears: dict[str, tuple[Tensor, Tensor]] = {}
        """Name of each linear → its inputs [W, L, K] and outputs [W, L, N]."""


@contextmanager
def observed(layer: nn.Module) -> Iterator[Seen]:
    """Watches every linear in the layer, in all threads."""
    seen = Seen()

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen.linears[name] = inputs[0], output

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in linears(layer)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ── scales: one model ───────────────────────────────────────────────────────────────────────────────────────────────


def round_layers_at_best_scales(
    read: ReadWeight, a: Architecture, schemes: Mapping[str, WeightScheme], stream: Tensor
) -> Iterator[tuple[str, Rounded]]:
    """Name and integers of every linear, in execution order. `stream` enters the first layer; it is overwritten."""
    rope = rope_tables(a, stream.shape[1], stream.device)
    for index in range(a.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = load_layer(read, a, prefix)
        importance: dict[str, Tensor] = {}
        with observed(layer) as seen:

            def powers(x: Tensor, layer: Layer = layer, seen: Seen = seen) -> dict[str, Tensor]:
                x[:] = layer(x, *rope, None)[0]
                return {name: inputs.flatten(0, -2).square().sum(0) for name, (inputs, _) in seen.linears.items()}

            for of_chunk in spread(powers, chunks(stream), stream.device.type):
                for name, power in of_chunk.items():
                    importance[name] = importance[name] + power if name in importance else power
        for name, linear in linears(layer):
            full_name = f"{prefix}{name}.weight"
            yield full_name, round_at_best_scales(linear.weight.detach(), importance[name], schemes[full_name])


# ── GPTQ: the full and the quantized model side by side ─────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Streams:
    """The streams of both models, for the same windows."""

    full: Tensor
    quantized: Tensor


@dataclass(frozen=True)
class Task:
    """What is done with every linear."""

    schemes: Mapping[str, WeightScheme]
    settings: Gptq
    calibrating: int
    """How many windows are calibrated with, the first ones; the others only pass through both models."""
    rounded_before: Callable[[str], Rounded | None]
    """What an interrupted run has rounded already."""
    dtype: torch.dtype
    """What both models compute in. Their streams, and all sums over tokens, are float32."""


def round_layers(read: ReadWeight, a: Architecture, task: Task, streams: Streams) -> Iterator[tuple[str, Rounded]]:
    """Name and integers of every linear, in execution order.

    `streams` enter the first layer; at the end they are what leaves the last one. Raises ExportError where
    calibration text says too little.
    """
    rope = tuple(table.to(task.dtype) for table in rope_tables(a, streams.full.shape[1], streams.full.device))
    for index in range(a.num_hidden_layers):
        prefix = f"model.layers.{index}."
        exact = load_layer(read, a, prefix)
        full = _computing(exact, a, task.dtype)
        quantized = load_layer(full.get_parameter, a, "")  # the same weights, until its own are put in their place
        for names in _SUBLAYERS:
            weights = {
                name: exact.get_parameter(f"{names.module}.{name}.weight") for name in (*names.first, names.last)
            }
            pair = _Pair(_Sublayer(full, names, rope), _Sublayer(quantized, names, rope), names, prefix, weights, task)
            yield from pair.round(streams)


def _computing(layer: Layer, a: Architecture, dtype: torch.dtype) -> Layer:
    """The same layer with its linears in another dtype."""

    def read(name: str) -> Tensor:
        weight = layer.get_parameter(name)
        return weight if weight.ndim == 1 else weight.to(dtype)

    return load_layer(read, a, "")


@dataclass(frozen=True)
class _Names:
    """The modules of a sublayer, as `Layer` names them."""

    module: str
    norm: str
    first: tuple[str, ...]
    last: str


_SUBLAYERS = (
    _Names("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    _Names("mlp", "post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj"),
)


class _Sublayer:
    """A sublayer of one model, cut in two: its last linear is taken out of its module."""

    def __init__(self, layer: Layer, names: _Names, rope: tuple[Tensor, ...]) -> None:
        self.module, self.norm, self.rope = layer.get_submodule(names.module), layer.get_submodule(names.norm), rope
        by_name = dict(linears(self.module))
        self.linears = {name: by_name[name] for name in (*names.first, names.last)}
        self.last = self.linears[names.last]
        if isinstance(self.module, Attention) and self.last.weight.dtype == torch.bfloat16:
            self.module.attend = attend_in_bfloat16
        setattr(self.module, names.last, nn.Identity())

    def normed(self, x: Tensor) -> Tensor:
        """Of a chunk of the stream: what the first linears read."""
        normed: Tensor = self.norm(x).to(self.last.weight.dtype)
        return normed

    def between(self, x: Tensor) -> Tensor:
        """Of a chunk of the stream: what the last linear reads."""
        normed, module = self.normed(x), self.module
        between: Tensor = module(normed, *self.rope, None)[0] if isinstance(module, Attention) else module(normed)
        return between


def attend_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, _visible: Tensor) -> Tensor:
    """Causal attention of q [B, H, S, D] to k and v [B, G, S, D], bfloat16 on the CPU; scores are float32.

    torch's own kernel takes three times as long on AMD: it multiplies by MKL, and also what no query sees.
    """
    batch, _, length, dim = q.shape
    groups = k.shape[1]
    out = torch.empty_like(q)
    queries, answers = (x.view(batch, groups, -1, length, dim) for x in (q.float(), out))
    keys, values = (x.float().reshape(batch * groups, length, dim) for x in (k, v))
    for now in blocks(length, _QUERIES):
        rows = queries[..., now, :]
        scores = torch.bmm(rows.reshape(batch * groups, -1, dim), keys[:, : now.stop].mT)
        scores = scores.mul_(dim**-0.5).view(batch * groups, -1, rows.shape[3], now.stop)
        scores[..., now] += torch.full((rows.shape[3], rows.shape[3]), -torch.inf).triu(1)
        answers[..., now, :] = torch.bmm(scores.softmax(-1).flatten(1, 2), values[:, : now.stop]).view(rows.shape)
    return out


@dataclass(frozen=True)
class _Pair:
    """One sublayer in both models."""

    full: _Sublayer
    quantized: _Sublayer
    names: _Names
    layer: str
    """What the names of the layer's tensors begin with."""
    weights: Mapping[str, Tensor]
    """The checkpoint's, float32."""
    task: Task

    @property
    def device(self) -> str:
        return self.weights[self.names.last].device.type

    def round(self, streams: Streams) -> Iterator[tuple[str, Rounded]]:
        """Round the first linears, then the last one, which reads what the rounded first ones make; then go on."""
        used = slice(self.task.calibrating)

        def pass_through(full: Tensor) -> None:
            full.add_(self.full.last(self.full.between(full)))

        def read(chunk: tuple[Tensor, Tensor]) -> None:
            quantized, inner = chunk
            inner.copy_(self.quantized.between(quantized))

        def add(chunk: tuple[Tensor, Tensor]) -> None:
            quantized, inner = chunk
            quantized.add_(self.quantized.last(inner))

        moving = [partial(pass_through, chunk) for chunk in chunks(streams.full)]
        yield from self._round(self.names.first, lambda: self._of_first(streams, used), moving)
        width = self.weights[self.names.last].shape[1]
        between = streams.full.new_empty(*streams.full.shape[:2], width, dtype=self.task.dtype)
        spread(read, zip(chunks(streams.quantized), chunks(between), strict=True), self.device)
        yield from self._round((self.names.last,), lambda: self._of_last(streams, between, used))
        spread(add, zip(chunks(streams.quantized), chunks(between), strict=True), self.device)

    def _of_first(self, streams: Streams, used: slice) -> Moments:
        """They should give for the quantized model's inputs what they give in the full model for its own."""

        def read(chunk: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
            full, quantized, x, missing = chunk
            x.copy_(self.quantized.normed(quantized))
            missing.copy_(self.full.norm(full) - self.quantized.norm(quantized))

        x, missing = (torch.empty_like(streams.full[used], dtype=self.task.dtype) for _ in range(2))
        pieces = zip(*map(chunks, (streams.full[used], streams.quantized[used], x, missing)), strict=True)
        spread(read, pieces, self.device)
        x, missing = x.flatten(0, 1), missing.flatten(0, 1)
        weight = torch.cat([self.weights[name] for name in self.names.first])
        return Moments(second_moments(x), product(weight, crossed_moments(missing, x)))

    def _of_last(self, streams: Streams, between: Tensor, used: slice) -> Moments:
        """It should bring the quantized stream to where the full one is by now: only it can take back what was lost."""

        def lose(chunk: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
            full, quantized, inner, lost = chunk
            lost.copy_(full - quantized - self.quantized.last(inner))

        lost = torch.empty_like(streams.full[used], dtype=self.task.dtype)
        pieces = zip(*map(chunks, (streams.full[used], streams.quantized[used], between[used], lost)), strict=True)
        spread(lose, pieces, self.device)
        x = between[used].flatten(0, 1)
        return Moments(second_moments(x), crossed_moments(lost.flatten(0, 1), x))

    def _round(
        self, linears: tuple[str, ...], moments: Callable[[], Moments], meanwhile: Sequence[Callable[[], None]] = ()
    ) -> Iterator[tuple[str, Rounded]]:
        """Round linears that read the same inputs; from now on the quantized model computes with the result.

        Rounding alone leaves processors idle: `meanwhile` is done beside it, after the moments.
        """
        names = [f"{self.layer}{self.names.module}.{linear}.weight" for linear in linears]
        before = [weight for name in names if (weight := self.task.rounded_before(name))]
        if len(before) == len(names):  # they are rounded together, or none
            rounding: Callable[[], list[Rounded]] = partial(list, before)
        else:
            weights = [self.weights[linear] for linear in linears]
            schemes = [self.task.schemes[name] for name in names]
            rounding = partial(round_linears, weights, schemes, moments(), self.task.settings)
        jobs: list[Callable[[], Any]] = [rounding, *meanwhile]
        try:
            rounded, *_ = spread(lambda job: job(), jobs, self.device)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise ExportError(
                f"{names[0]}: its calibration inputs have no Cholesky factor; raise `damping` or calibrate with "
                "more text"
            ) from None
        for linear, name, weight in zip(linears, names, rounded, strict=True):
            dequantized = weight.dequantized().to(self.weights[linear].device, self.task.dtype)
            self.quantized.linears[linear].weight = nn.Parameter(dequantized, requires_grad=False)
            yield name, weight
