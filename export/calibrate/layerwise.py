"""Walks the model layer by layer, full and quantized side by side, and rounds every linear for the inputs it will get.

Both models read the same calibration text. A linear is rounded for the quantized model's inputs and the full model's
outputs, so that later layers repair what earlier ones lost; one layer's weights are in memory at a time.

Shapes: W windows, L tokens of each, D hidden size, N and K output and input features of a linear.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..model import Layer, rope_tables
from ..plan import Architecture
from ..rounding import Rounded
from .gptq import Moments, Rounding

ReadWeight = Callable[[str], Tensor]
Done = Callable[[str], Rounded | None]
"""What an interrupted run has rounded already."""
WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class Part:
    """Half of a layer: linears that read the norm, then one that adds to the residual stream."""

    module: str
    norm: str
    first: tuple[str, ...]
    last: str
    attends: bool


PARTS = (
    Part("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj", attends=True),
    Part("mlp", "post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj", attends=False),
)


@dataclass(frozen=True)
class Both:
    """The same of the full and of the quantized model, each float32 [W, L, …]."""

    full: Tensor
    quantized: Tensor


def round_layers(
    read: ReadWeight, a: Architecture, rounding: Rounding, stream: Both, done: Done
) -> Iterator[tuple[str, Rounded]]:
    """Name and integers of every linear, in execution order.

    `stream` is what enters the first layer; it is used up. Raises ExportError where calibration text says too little.
    """
    rope = rope_tables(a, stream.full.shape[1])
    for index in range(a.num_hidden_layers):
        prefix = f"model.layers.{index}."
        full, quantized = load_layer(read, a, prefix), load_layer(read, a, prefix)
        for part in PARTS:
            halves = Halves(Half(full, part, rope), Half(quantized, part, rope), f"{prefix}{part.module}.")
            inputs = halves.full.normed(stream.full), halves.quantized.normed(stream.quantized)
            yield from halves.round(part.first, rounding, done, (*inputs, None))
            inner = Both(halves.full.inner(stream.full), halves.quantized.inner(stream.quantized))
            drift = (f - q for f, q in zip(pieces(stream.full), pieces(stream.quantized), strict=True))
            yield from halves.round((part.last,), rounding, done, (pieces(inner.full), pieces(inner.quantized), drift))
            halves.full.add(stream.full, inner.full)
            halves.quantized.add(stream.quantized, inner.quantized)


def pieces(x: Tensor) -> Iterator[Tensor]:
    """Some windows at a time."""
    return iter(torch.split(x, WINDOWS_AT_ONCE))


def load_layer(read: ReadWeight, a: Architecture, prefix: str) -> Layer:
    """One layer with the checkpoint's weights."""
    with torch.device("meta"):
        layer = Layer(a)
    for name, _ in list(layer.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, nn.Parameter(read(prefix + name), requires_grad=False))
    return layer


class Half:
    """One part of a layer, computed some windows at a time."""

    def __init__(self, layer: Layer, part: Part, rope: tuple[Tensor, Tensor]) -> None:
        self.part, self.rope = part, rope
        self.module, self.norm = layer.get_submodule(part.module), layer.get_submodule(part.norm)

    def linear(self, name: str) -> nn.Linear:
        found: nn.Linear = self.module.get_submodule(name)  # type: ignore[assignment]
        return found

    def normed(self, stream: Tensor) -> Iterator[Tensor]:
        """What the first linears read."""
        return (self.norm(x) for x in pieces(stream))

    def inner(self, stream: Tensor) -> Tensor:
        """What the last linear reads, [W, L, K]."""
        last = self.linear(self.part.last)
        out = torch.empty(*stream.shape[:2], last.weight.shape[1])
        setattr(self.module, self.part.last, nn.Identity())
        for x, to in zip(self.normed(stream), pieces(out), strict=True):
            to[:] = self.module(x, *self.rope, None)[0] if self.part.attends else self.module(x)
        setattr(self.module, self.part.last, last)
        return out

    def add(self, stream: Tensor, inner: Tensor) -> None:
        """Add the part's result to the residual stream, in place."""
        last = self.linear(self.part.last)
        for x, to in zip(pieces(inner), pieces(stream), strict=True):
            to.add_(last(x))


Inputs = tuple[Iterator[Tensor], Iterator[Tensor], Iterator[Tensor] | None]
"""Of some linears: the full model's inputs, the quantized one's, and the drift of the stream they add to."""


@dataclass(frozen=True)
class Halves:
    """One part of a layer with both models' weights."""

    full: Half
    quantized: Half
    where: str
    """The names of its tensors begin so."""

    def round(
        self, names: Sequence[str], rounding: Rounding, done: Done, inputs: Inputs
    ) -> Iterator[tuple[str, Rounded]]:
        """Round linears that have the same inputs, and let the quantized model compute with the result."""
        known = [done(f"{self.where}{name}.weight") for name in names]
        found = [one for one in known if one] if all(known) else self.rounded(names, rounding, inputs)
        for name, one in zip(names, found, strict=True):
            self.quantized.linear(name).weight = nn.Parameter(one.dequantized(), requires_grad=False)
            yield f"{self.where}{name}.weight", one

    def rounded(self, names: Sequence[str], rounding: Rounding, inputs: Inputs) -> list[Rounded]:
        """All at once, their rows one after another: they share the inputs' moments."""
        weights = [self.full.linear(name).weight.detach() for name in names]
        try:
            return rounding.choose(weights, gather(*inputs))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise ExportError(
                f"{self.where}{names[0]}: its calibration inputs have no Cholesky factor; raise `damping` or calibrate "
                "with more text"
            ) from None


def gather(full: Iterator[Tensor], quantized: Iterator[Tensor], drift: Iterator[Tensor] | None) -> Moments:
    """Sums over all windows."""
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    drifts: Tensor | None = None
    for x, y in zip(full, quantized, strict=True):
        now = y.flatten(0, 1)
        inputs = plus(inputs, now, now)
        outputs = plus(outputs, x.flatten(0, 1), now)
        if drift is not None:
            drifts = plus(drifts, next(drift).flatten(0, 1), now)
    assert inputs is not None
    assert outputs is not None
    return Moments(inputs, outputs, drifts)


def plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + aᵀ b."""
    return a.T @ b if total is None else total.addmm_(a.T, b)
