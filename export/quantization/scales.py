"""One weight → scales with the least weighted error, and the integers nearest to it at these scales.

A column's weight is Σ x² of the input that it multiplies, over calibration text: an error e in it changes the output by
e · x, so to first order (inputs uncorrelated) Σ x² · e² is what the linear loses.

Shapes: N rows (output features), K columns (input features).
"""

import torch
from torch import Tensor

from export.plan import WeightScheme

from .nearest import SMALLEST_SCALE, Rounded, compared, integer_range

_SEARCHED_AT_ONCE = 2**18
"""Elements whose scales are searched together: they stay in a core's cache for all tries."""
_SHRINK = torch.linspace(0.6, 1.05, 46).tolist()
"""Scales that are tried, in parts of the smallest one that clips nothing."""


def choose_scales(weight: Tensor, importance: Tensor, scheme: WeightScheme) -> Tensor:
    """weight [N, K], importance of columns [K] → scales [N, groups], exact in bf16, with the least weighted error."""
    rows = max(1, _SEARCHED_AT_ONCE // weight.shape[1])
    return torch.cat([_choose_in_block(block, importance, scheme) for block in torch.split(weight, rows)])


def _choose_in_block(weight: Tensor, importance: Tensor, scheme: WeightScheme) -> Tensor:
    low, high = integer_range(scheme)
    groups = weight.reshape(len(weight), -1, scheme.group_size or weight.shape[1])  # [N, groups, columns of a group]
    group_importance = importance.reshape(groups.shape[1:])
    # the range −8 … 7 is uneven: whichever end a group reaches first decides (smallest and low are both negative)
    unclipped = torch.maximum(groups.amax(-1) / high, groups.amin(-1) / low)
    best, least = torch.empty_like(unclipped), torch.full_like(unclipped, torch.inf)
    for part in _SHRINK:
        # errors are measured at the bf16 value that will be stored, not at the one before rounding
        scale = (unclipped * part).clamp(min=SMALLEST_SCALE).bfloat16().float()
        rounded = (groups / scale[..., None]).round_().clamp_(low, high).mul_(scale[..., None])
        error = rounded.sub_(groups).square_().mul_(group_importance).sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def round_at_best_scales(weight: Tensor, importance: Tensor, scheme: WeightScheme) -> Rounded:
    """weight [N, K], importance of its columns [K]: the integers nearest to it at scales of least weighted error."""
    scale = choose_scales(weight, importance, scheme)
    columns = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return compared(weight, (weight / columns).round_().clamp_(*integer_range(scheme)).to(torch.int8), scale)
