"""What rounding one linear costs the whole model: its share of the KL divergence, estimated with one backward pass.

To second order, KL between the full model and one whose linear gives y + δ instead of y is ½ E[(g·δ)²] per position,
with g the gradient of log p(token) for a token drawn from the full model itself (the Fisher information; Amari 1998,
"Natural Gradient Works Efficiently in Learning"). δ is what rounding the weight does to y. Contributions of linears
and of positions are taken to add up; where errors at many positions are alike (v_proj), the estimate is too low.
Layers stream from the checkpoint, forwards and then backwards; of each, only what enters it stays in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from torch import Tensor

from export.architecture import Architecture
from export.errors import ExportError
from export.manifest import Candidate
from export.model import Layer, rope_tables
from export.plan import Promotion, QuantRecipe, WeightScheme

from .layerwise import ReadWeight, linears, load_layer, observed
from .nearest import round_at_best_scales
from .schemes import Schemes, bits_each
from .spread import spread


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

    norm: Callable[[Tensor], Tensor]
    """The last norm, then the rotation where the model is rotated."""
    weight: Tensor
    """[V, D]"""


def measure(
    read: ReadWeight, a: Architecture, head: Head, streams: list[Tensor], schemes: tuple[WeightScheme, WeightScheme]
) -> Iterator[tuple[str, Sensitivity]]:
    """Name and sensitivity of every linear, last layer first.

    `streams` [1, L, D] each enter the first layer; `schemes`: the recipe's and the promoted one. Seeded: tokens are
    drawn with torch's generator at 0.
    """
    # A backward pass through the whole model would hold all its weights and activations. Layer by layer it needs the
    # stream before each layer (computed without gradients) and one layer's graph, built again on the way back.
    rope, device = rope_tables(a, streams[0].shape[1], streams[0].device), streams[0].device.type
    entering = [streams]
    with torch.no_grad():
        for index in range(a.num_hidden_layers):
            layer = load_layer(read, a, f"model.layers.{index}.")
            entering.append(spread(partial(_through, layer, rope), entering[-1], device))
    numbered = list(enumerate(entering.pop()))
    gradients = spread(lambda window: gradient_of_sample(head, window[1], seed=window[0]), numbered, device)
    for index in reversed(range(a.num_hidden_layers)):
        prefix = f"model.layers.{index}."
        layer = load_layer(read, a, prefix)
        watched = _backward(layer, rope, entering.pop(), gradients)
        gradients = [gradient for gradient, _ in watched]
        for name, linear in linears(layer):
            pairs = [pairs_of[name] for _, pairs_of in watched]
            yield f"{prefix}{name}.weight", _sensitivity(linear.weight.detach(), pairs, schemes)


def _through(layer: Layer, rope: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    out: Tensor = layer(x, *rope, None)[0]
    return out


def gradient_of_sample(head: Head, stream: Tensor, seed: int) -> Tensor:
    """d Σ log p(y) / d stream [1, L, D], each y drawn from the model's own distribution at its position.

    Drawn, not taken from the text: only then is E[g gᵀ] the Fisher information, which is the Hessian of the KL.
    """
    stream = stream.detach().requires_grad_()
    logits = head.norm(stream)[0] @ head.weight.T  # [L, V]
    probabilities = logits.detach().softmax(-1)
    drawn = torch.multinomial(probabilities, 1, generator=torch.Generator(stream.device).manual_seed(seed))
    of_logits = probabilities.neg_()  # d log p(y) / d logits = onehot(y) − p
    of_logits[torch.arange(len(drawn), device=drawn.device), drawn[:, 0]] += 1
    (gradient,) = torch.autograd.grad(logits, stream, of_logits)
    return gradient


_Pair = tuple[Tensor, Tensor]
"""What a linear read, [L, K], and the gradient of its outputs, [L, N]."""


def _backward(
    layer: Layer, rope: _Pair, streams: list[Tensor], gradients: list[Tensor]
) -> list[tuple[Tensor, dict[str, _Pair]]]:
    """Of each window: the gradient of what entered the layer, and what was seen at every linear."""
    with observed(layer) as seen:

        def of_window(window: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, _Pair]]:
            x = window[0].detach().requires_grad_()
            out = layer(x, *rope, None)[0]
            outputs = (output for _, output in seen.linears.values())
            of_x, *of_outputs = torch.autograd.grad(out, [x, *outputs], window[1])
            pairs = zip(seen.linears.items(), of_outputs, strict=True)
            return of_x, {name: (inputs.detach()[0], of_output[0]) for (name, (inputs, _)), of_output in pairs}

        return spread(of_window, zip(streams, gradients, strict=True), streams[0].device.type)


def _sensitivity(weight: Tensor, pairs: list[_Pair], schemes: tuple[WeightScheme, WeightScheme]) -> Sensitivity:
    """½ E[(g·δ)²] of the weight rounded to nearest in either scheme."""
    power: Tensor = sum((x.square().sum(0) for x, _ in pairs), torch.zeros_like(weight[0]))
    losses = []
    for scheme in schemes:
        change = round_at_best_scales(weight, power, scheme).dequantized() - weight

        def squared(pair: _Pair, change: Tensor = change) -> Tensor:
            x, gradient = pair
            return ((x @ change.T) * gradient).sum(-1).square()

        squares = spread(squared, pairs, weight.device.type)
        losses.append(float(torch.cat(squares).mean()) / 2)
    return Sensitivity(*losses)


# ── which linears get more bits ─────────────────────────────────────────────────────────────────────────────────────


def ranked(sensitivities: Mapping[str, Sensitivity], base: Schemes, promotion: Promotion) -> list[Candidate]:
    """Every linear, the one that saves most per byte first."""
    candidates = []
    for name, shape in base.architecture.linear_shapes().items():
        more = bits_each(promotion.scheme, shape[-1]) - bits_each(base.by_name[name], shape[-1])
        candidates.append(
            Candidate(
                name=name,
                kl=sensitivities[name].kl,
                promoted_kl=sensitivities[name].promoted_kl,
                extra_bytes=int(torch.Size(shape).numel() * more / 8),
                promoted=False,
            )
        )
    return sorted(candidates, key=lambda linear: (linear.promoted_kl - linear.kl) / linear.extra_bytes)


def affordable(candidates: Sequence[Candidate], extra_bytes: float) -> list[str]:
    """Names, best first, each taken when it still fits."""
    names = []
    for linear in candidates:
        if linear.extra_bytes <= extra_bytes:
            names.append(linear.name)
            extra_bytes -= linear.extra_bytes
    return names


def budget_bytes(recipe: QuantRecipe, base: Schemes) -> float:
    """Bytes that promotions may add.

    Raises ExportError: the recipe without any promotion is over its budget already.
    """
    promotion = recipe.promotion
    assert promotion is not None
    shapes, bits = base.architecture.linear_shapes(), promotion.linear_bits_per_weight
    weights = sum(torch.Size(shape).numel() for shape in shapes.values())
    smallest = sum(
        torch.Size(shape).numel() * bits_each(base.by_name[name], shape[-1]) for name, shape in shapes.items()
    )
    if bits < smallest / weights:
        nearest = ceil(smallest / weights * 1000) / 1000
        raise ExportError(
            f"recipe {recipe.name!r}: linear_bits_per_weight {bits:g} cannot be met: without any promotion it is "
            f"{nearest:g}; give at least that, or larger groups in `linear`"
        )
    return (bits * weights - smallest) / 8


def marked(candidates: Iterable[Candidate], names: Iterable[str]) -> tuple[Candidate, ...]:
    """The candidates, with those of these names promoted."""
    promoted = set(names)
    return tuple(linear.model_copy(update={"promoted": linear.name in promoted}) for linear in candidates)
