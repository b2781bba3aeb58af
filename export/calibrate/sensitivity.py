"""What rounding one linear costs the whole model: its share of the KL divergence, estimated with one backward pass.

To second order, KL between the full model and one whose linear gives y + δ instead of y is ½ E[(g·δ)²] per position,
with g the gradient of log p(token) for a token drawn from the full model itself (the Fisher information; Amari 1998,
"Natural Gradient Works Efficiently in Learning"). δ is what rounding the weight does to y. Contributions of linears
and of positions are taken to add up; where errors at many positions are alike (v_proj), the estimate is too low.
Layers stream from the checkpoint, forwards and then backwards; of each, what enters it is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model import Layer, rope_tables
from ..plan import Architecture, WeightScheme
from .observe import ReadWeight, load_layer, observed
from .scales import linears, nearest


@dataclass(frozen=True)
class Sensitivity:
    """Of one linear: the model's KL divergence when it alone is rounded, nats per position."""

    kl: float
    """In the recipe's scheme."""
    promoted_kl: float
    """In the promoted scheme."""


@dataclass(frozen=True)
class Head:
    """What turns the last stream into logits."""

    norm: nn.Module
    """And the rotation after it where there is one."""
    weight: Tensor
    """[V, D]"""


def measure(
    read: ReadWeight, a: Architecture, head: Head, streams: list[Tensor], schemes: tuple[WeightScheme, WeightScheme]
) -> Iterator[tuple[str, Sensitivity]]:
    """Name and sensitivity of every linear, last layer first.

    `streams` [1, L, D] each enter the first layer; `schemes`: the recipe's and the promoted one. Seeded: tokens are
    drawn with torch's generator at 0.
    """
    rope = rope_tables(a, streams[0].shape[1])
    entering = [streams]
    with torch.no_grad():
        for index in range(a.num_hidden_layers):
            layer = load_layer(read, a, f"model.layers.{index}.")
            entering.append([layer(x, *rope, None)[0] for x in entering[-1]])
    generator = torch.Generator(head.weight.device).manual_seed(0)
    gradients = [gradient_of_sample(head, x, generator) for x in entering.pop()]
    for index in reversed(range(a.num_hidden_layers)):
        prefix = f"model.layers.{index}."
        layer = load_layer(read, a, prefix)
        watched = [backward(layer, rope, x, gradient) for x, gradient in zip(entering.pop(), gradients, strict=True)]
        gradients = [gradient for gradient, _ in watched]
        for name, weight in linears(layer):
            pairs = [found[name] for _, found in watched]
            yield f"{prefix}{name}.weight", sensitivity(weight, pairs, schemes)


def gradient_of_sample(head: Head, stream: Tensor, generator: torch.Generator) -> Tensor:
    """d Σ log p(y) / d stream [1, L, D], each y drawn from the model's own distribution at its position."""
    stream = stream.detach().requires_grad_()
    logits = head.norm(stream)[0] @ head.weight.T  # [L, V]
    chances = logits.detach().softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=generator)
    of_logits = chances.neg_()  # d log p(y) / d logits = onehot(y) − p
    of_logits[torch.arange(len(drawn)), drawn[:, 0]] += 1
    (gradient,) = torch.autograd.grad(logits, stream, of_logits)
    return gradient


Pair = tuple[Tensor, Tensor]
"""What a linear read, [L, K], and the gradient of its outputs, [L, N]."""


def backward(layer: Layer, rope: Pair, x: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Pair]]:
    """Gradient of what entered the layer, and of every linear's outputs."""
    x = x.detach().requires_grad_()
    with observed(layer) as seen:
        out = layer(x, *rope, None)[0]
    wanted = [x, *(output for _, output in seen.values())]
    of_x, *of_outputs = torch.autograd.grad(out, wanted, gradient)
    pairs = zip(seen.items(), of_outputs, strict=True)
    return of_x, {name: (inputs.detach()[0], found[0]) for (name, (inputs, _)), found in pairs}


def sensitivity(weight: Tensor, pairs: list[Pair], schemes: tuple[WeightScheme, WeightScheme]) -> Sensitivity:
    """½ E[(g·δ)²] of the weight rounded to nearest in either scheme."""
    power: Tensor = sum((x.square().sum(0) for x, _ in pairs), torch.zeros_like(weight[0]))
    lost = []
    for scheme in schemes:
        change = nearest(weight, power, scheme).dequantized() - weight
        squares = [((x @ change.T) * gradient).sum(-1).square() for x, gradient in pairs]
        lost.append(float(torch.cat(squares).mean()) / 2)
    return Sensitivity(*lost)
