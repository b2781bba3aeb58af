"""Layer by layer over calibration text: what every linear reads, and its integers.

Words:
    full model       the checkpoint in float
    quantized model  the same, except that linears which are rounded already compute with their integers
    stream           the residual stream between layers, float32 [W, L, D]: W windows of L tokens, D hidden features
    sublayer         half of a layer: its norm, then attention or the MLP, whose result is added to the stream
    first linears    of a sublayer: read the normed stream (q, k, v; gate, up)
    last linear      of a sublayer: adds to the stream (o; down); it reads what lies `between` first and last
    chunk            a few windows that are computed at once, so that memory does not grow with the text
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.architecture import Architecture
from export.errors import ExportError
from export.model import Attention, Layer, rope_tables
from export.plan import Gptq, WeightScheme

from .gptq import Moments, round_linears
from .nearest import Rounded, round_at_best_scales

ReadWeight = Callable[[str], Tensor]
_WINDOWS_AT_ONCE = 4


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


@contextmanager
def observed(layer: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Name of each linear in the layer → its last inputs [W, L, K] and outputs [W, L, N]."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen[name] = inputs[0], output

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
        for x in chunks(stream):
            with observed(layer) as seen:
                x[:] = layer(x, *rope, None)[0]
            for name, (inputs, _) in seen.items():
                power = inputs.flatten(0, -2).square().sum(0)
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


def round_layers(read: ReadWeight, a: Architecture, task: Task, streams: Streams) -> Iterator[tuple[str, Rounded]]:
    """Name and integers of every linear, in execution order.

    `streams` enter the first layer; at the end they are what leaves the last one. Raises ExportError where
    calibration text says too little.
    """
    rope = rope_tables(a, streams.full.shape[1], streams.full.device)
    for index in range(a.num_hidden_layers):
        prefix = f"model.layers.{index}."
        full, quantized = load_layer(read, a, prefix), load_layer(read, a, prefix)
        for names in _SUBLAYERS:
            pair = _Pair(_Sublayer(full, names, rope), _Sublayer(quantized, names, rope), names, prefix, task)
            yield from pair.round(streams)


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
    """A sublayer of one model, computed chunk by chunk."""

    def __init__(self, layer: Layer, names: _Names, rope: tuple[Tensor, ...]) -> None:
        self.module, self.norm = layer.get_submodule(names.module), layer.get_submodule(names.norm)
        self.last, self.rope = names.last, rope

    def linear(self, name: str) -> nn.Linear:
        linear: nn.Linear = self.module.get_submodule(name)  # type: ignore[assignment]
        return linear

    def normed(self, stream: Tensor) -> Iterator[Tensor]:
        """What the first linears read."""
        return (self.norm(x) for x in chunks(stream))

    def between(self, stream: Tensor) -> Tensor:
        """What the last linear reads, [W, L, K]: the module's output while an identity stands in for that linear."""
        last = self.linear(self.last)
        out = stream.new_empty(*stream.shape[:2], last.weight.shape[1])
        setattr(self.module, self.last, nn.Identity())
        for x, to in zip(self.normed(stream), chunks(out), strict=True):
            to[:] = self.module(x, *self.rope, None)[0] if isinstance(self.module, Attention) else self.module(x)
        setattr(self.module, self.last, last)
        return out

    def add(self, stream: Tensor, between: Tensor) -> None:
        """Add the sublayer's result to the stream, in place."""
        last = self.linear(self.last)
        for x, to in zip(chunks(between), chunks(stream), strict=True):
            to.add_(last(x))


_Drift = Iterator[Tensor] | None
"""Full less quantized stream, chunk by chunk; None: the linears do not add to the stream."""


@dataclass(frozen=True)
class _Pair:
    """One sublayer in both models."""

    full: _Sublayer
    quantized: _Sublayer
    names: _Names
    layer: str
    """What the names of the layer's tensors begin with."""
    task: Task

    def round(self, streams: Streams) -> Iterator[tuple[str, Rounded]]:
        """Round the first linears, then the last one, which reads what the rounded first ones make; then go on."""
        full, quantized = (stream[: self.task.calibrating] for stream in (streams.full, streams.quantized))
        yield from self._round(self.names.first, self.full.normed(full), self.quantized.normed(quantized), None)
        between = Streams(self.full.between(streams.full), self.quantized.between(streams.quantized))
        inner, quantized_inner = (chunks(x[: self.task.calibrating]) for x in (between.full, between.quantized))
        # Only the last linear adds to the stream, so only it can take back what was lost in the layers before.
        drift = (f - q for f, q in zip(chunks(full), chunks(quantized), strict=True))
        yield from self._round((self.names.last,), inner, quantized_inner, drift)
        self.full.add(streams.full, between.full)
        self.quantized.add(streams.quantized, between.quantized)

    def _round(
        self, linears: tuple[str, ...], full: Iterator[Tensor], quantized: Iterator[Tensor], drift: _Drift
    ) -> Iterator[tuple[str, Rounded]]:
        """Round linears that read the same inputs; from now on the quantized model computes with the result."""
        names = [f"{self.layer}{self.names.module}.{linear}.weight" for linear in linears]
        before = [self.task.rounded_before(name) for name in names]
        rounded = [weight for weight in before if weight]
        if len(rounded) < len(names):  # they are rounded together, or none
            weights = [self.full.linear(linear).weight.detach() for linear in linears]
            schemes = [self.task.schemes[name] for name in names]
            try:
                rounded = round_linears(weights, schemes, _moments(full, quantized, drift), self.task.settings)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise ExportError(
                    f"{names[0]}: its calibration inputs have no Cholesky factor; raise `damping` or calibrate with "
                    "more text"
                ) from None
        for linear, name, weight in zip(linears, names, rounded, strict=True):
            self.quantized.linear(linear).weight = nn.Parameter(weight.dequantized(), requires_grad=False)
            yield name, weight


def _moments(full: Iterator[Tensor], quantized: Iterator[Tensor], drift: _Drift) -> Moments:
    """Second moments of some linears' inputs, summed over chunks [W, L, K]."""
    inputs: Tensor | None = None
    crossed: Tensor | None = None
    drifts: Tensor | None = None
    for full_chunk, quantized_chunk in zip(full, quantized, strict=True):
        x = quantized_chunk.flatten(0, 1)
        inputs = _plus(inputs, x, x)
        crossed = _plus(crossed, full_chunk.flatten(0, 1), x)
        if drift is not None:
            drifts = _plus(drifts, next(drift).flatten(0, 1), x)
    assert inputs is not None
    assert crossed is not None
    return Moments(inputs, crossed, drifts)


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a.T @ b if total is None else total.addmm_(a.T, b)
