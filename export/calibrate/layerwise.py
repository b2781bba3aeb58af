"""Walks the model layer by layer, full and quantized side by side, and rounds every linear for the inputs it will get.

Both models read the same calibration text. A linear is rounded for the quantized model's inputs and the full model's
outputs, so that later layers repair what earlier ones lost; one layer's weights are in memory at a time. The last
windows are only carried through: what is lost on them is what text costs that was not calibrated with.

Shapes: W windows, L tokens of each, D hidden size, N and K output and input features of a linear.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..model import Layer, rope_tables
from ..plan import Architecture, WeightScheme
from ..rounding import Rounded
from .activations import unchanged
from .gptq import Moments, Rounding
from .observe import ReadWeight, load_layer
from .pieces import pieces

Done = Callable[[str], Rounded | None]
"""What an interrupted run has rounded already."""
SchemeOf = Callable[[str], WeightScheme]
Round = Callable[[Tensor], Tensor]
"""What happens to a linear's inputs in the quantized model: nothing, or int8 per token."""


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


@dataclass(frozen=True)
class Task:
    """What the walk does to every linear."""

    scheme_of: SchemeOf
    rounding: Rounding
    activations: Round
    used: int
    """Windows that are calibrated with, the first ones."""
    done: Done


def round_layers(read: ReadWeight, a: Architecture, task: Task, stream: Both) -> Iterator[tuple[str, Rounded]]:
    """Name and integers of every linear, in execution order.

    `stream` is what enters the first layer; at the end it is what leaves the last one. Raises ExportError where
    calibration text says too little.
    """
    rope = tuple(table.to(stream.full.device) for table in rope_tables(a, stream.full.shape[1]))
    for index in range(a.num_hidden_layers):
        prefix = f"model.layers.{index}."
        full, quantized = load_layer(read, a, prefix), load_layer(read, a, prefix)
        for part in PARTS:
            halves = Halves(
                Half(full, part, rope, unchanged),
                Half(quantized, part, rope, task.activations),
                f"{prefix}{part.module}.",
                task,
            )
            used = Both(stream.full[: task.used], stream.quantized[: task.used])
            inputs = halves.full.normed(used.full), halves.quantized.normed(used.quantized)
            yield from halves.round(part.first, (*inputs, None))
            inner = Both(halves.full.inner(stream.full), halves.quantized.inner(stream.quantized))
            drift = (f - q for f, q in zip(pieces(used.full), pieces(used.quantized), strict=True))
            read_by_last = pieces(inner.full[: task.used]), pieces(inner.quantized[: task.used])
            yield from halves.round((part.last,), (*read_by_last, drift))
            halves.full.add(stream.full, inner.full)
            halves.quantized.add(stream.quantized, inner.quantized)


class Half:
    """One part of a layer, computed some windows at a time."""

    def __init__(self, layer: Layer, part: Part, rope: tuple[Tensor, ...], activations: Round) -> None:
        self.part, self.rope, self.activations = part, rope, activations
        self.module, self.norm = layer.get_submodule(part.module), layer.get_submodule(part.norm)

    def linear(self, name: str) -> nn.Linear:
        found: nn.Linear = self.module.get_submodule(name)  # type: ignore[assignment]
        return found

    def normed(self, stream: Tensor) -> Iterator[Tensor]:
        """What the first linears read."""
        return (self.activations(self.norm(x)) for x in pieces(stream))

    def inner(self, stream: Tensor) -> Tensor:
        """What the last linear reads, [W, L, K]."""
        last = self.linear(self.part.last)
        out = stream.new_empty(*stream.shape[:2], last.weight.shape[1])
        setattr(self.module, self.part.last, nn.Identity())
        for x, to in zip(self.normed(stream), pieces(out), strict=True):
            to[:] = self.activations(self.module(x, *self.rope, None)[0] if self.part.attends else self.module(x))
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
    task: Task

    def round(self, linears: Sequence[str], inputs: Inputs) -> Iterator[tuple[str, Rounded]]:
        """Round linears that have the same inputs, and let the quantized model compute with the result."""
        names = [f"{self.where}{linear}.weight" for linear in linears]
        known = [self.task.done(name) for name in names]
        found = [one for one in known if one] if all(known) else self.rounded(linears, names, inputs)
        for linear, name, one in zip(linears, names, found, strict=True):
            self.quantized.linear(linear).weight = nn.Parameter(one.dequantized(), requires_grad=False)
            yield name, one

    def rounded(self, linears: Sequence[str], names: Sequence[str], inputs: Inputs) -> list[Rounded]:
        """All at once, their rows one after another: they share the inputs' moments."""
        weights = [self.full.linear(linear).weight.detach() for linear in linears]
        schemes = [self.task.scheme_of(name) for name in names]
        try:
            return self.task.rounding.choose(weights, schemes, gather(*inputs))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise ExportError(
                f"{names[0]}: its calibration inputs have no Cholesky factor; raise `damping` or calibrate with more "
                "text"
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
