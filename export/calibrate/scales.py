"""Round to nearest with scales that lose least of what a linear computes: the cheap use of calibration text."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..model import rope_tables
from ..plan import Architecture, WeightScheme
from ..rounding import Rounded, compared
from .gptq import choose_scales, limits
from .observe import ReadWeight, load_layer, observed
from .pieces import pieces


def round_layers(
    read: ReadWeight, a: Architecture, scheme_of: Callable[[str], WeightScheme], stream: Tensor
) -> Iterator[tuple[str, Rounded]]:
    """Name and integers of every linear, in execution order. `stream` [W, L, D] enters the first layer; is used up."""
    rope = rope_tables(a, stream.shape[1])
    for index in range(a.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = load_layer(read, a, prefix)
        importance: dict[str, Tensor] = {}
        for x in pieces(stream):
            with observed(layer) as seen:
                x[:] = layer(x, *rope, None)[0]
            for name, (inputs, _) in seen.items():
                power = inputs.flatten(0, -2).square().sum(0)
                importance[name] = importance[name] + power if name in importance else power
        for name, weight in linears(layer):
            yield f"{prefix}{name}.weight", nearest(weight, importance[name], scheme_of(f"{prefix}{name}.weight"))


def linears(layer: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name within the layer and weight [N, K] of every linear."""
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield name, module.weight.detach()


def nearest(weight: Tensor, importance: Tensor, scheme: WeightScheme) -> Rounded:
    """weight [N, K], importance of its columns [K]: integers nearest to it at scales of least weighted error."""
    scale = choose_scales(weight, importance, scheme)
    columns = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return compared(weight, (weight / columns).round_().clamp_(*limits(scheme)).to(torch.int8), scale)
