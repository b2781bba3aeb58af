"""One weight, its inputs' second moments → integers. Knows nothing about models or text.

GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022) for
symmetric integers: columns are rounded one after another, most important first, and what rounding one did to the
output is taken back by those not yet rounded. Scales belong to fixed groups of columns and are chosen before.

Shapes: N rows (output features), K columns (input features).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import WeightScheme
from ..rounding import SMALLEST_SCALE, Rounded, compared

BLOCK = 64
"""Columns whose errors are spread at once."""
SEARCHED_AT_ONCE = 2**18
"""Elements whose scales are searched together: they stay in a core's cache for all tries."""
SHRINK = torch.linspace(0.6, 1.05, 46).tolist()
"""Scales that are tried, in parts of the smallest one that clips nothing."""


@dataclass(frozen=True)
class Moments:
    """Σ over calibration tokens, float32."""

    inputs: Tensor
    """[K, K]  Σ x̂ x̂ᵀ of the quantized model's inputs x̂."""
    full: Tensor
    """[K, K]  Σ x x̂ᵀ, with the full model's inputs x to the same linear."""
    drift: Tensor | None
    """[N, K]  Σ d x̂ᵀ, where d is how far the quantized model's residual stream is behind the full one's, for linears
    that add to it; else None."""


@dataclass(frozen=True)
class Rounding:
    """How linears are rounded."""

    damping: float
    """Added to the diagonal of the inputs' moments before they are inverted, in parts of its mean."""
    pull: float
    """Draws the target towards the weight itself, in parts of the mean second moment: few tokens know little."""

    def choose(self, weights: Sequence[Tensor], schemes: Sequence[WeightScheme], moments: Moments) -> list[Rounded]:
        """Integers and scales of linears with the same inputs, float32 [N, K] each.

        Raises torch.linalg.LinAlgError if the moments are not positive definite even when damped.
        """
        rows = [len(weight) for weight in weights]
        wanted = torch.split(target(torch.cat(list(weights)), moments, self.pull), rows)
        order = moments.inputs.diagonal().argsort(descending=True)
        factor = inverse_factor(moments.inputs[order][:, order], self.damping)
        found: dict[int, Rounded] = {}
        for scheme in dict.fromkeys(schemes):  # rows of one scheme one after another: they are computed together
            same = [i for i, one in enumerate(schemes) if one == scheme]
            stacked = torch.cat([wanted[i] for i in same])
            scale = choose_scales(stacked, moments.inputs.diagonal(), scheme)
            integers = choose_integers(stacked, order, factor, scale, scheme)
            parts = (torch.split(tensor, [rows[i] for i in same]) for tensor in (integers, scale))
            for i, qdata, its_scale in zip(same, *parts, strict=True):
                found[i] = compared(weights[i], qdata.contiguous(), its_scale.contiguous())
        return [found[i] for i in range(len(weights))]


def target(weight: Tensor, moments: Moments, pull: float) -> Tensor:
    """The weight [N, K] that turns the quantized model's inputs into the full model's outputs, by least squares.

    `pull` draws it towards the weight itself, in parts of the mean second moment: few tokens know little.
    """
    strength = pull * moments.inputs.diagonal().mean()
    wanted = weight @ moments.full + strength * weight
    if moments.drift is not None:
        wanted += moments.drift
    damped = moments.inputs.clone()
    damped.diagonal().add_(strength)
    return torch.cholesky_solve(wanted.T, torch.linalg.cholesky(damped)).T.contiguous()


def limits(scheme: WeightScheme) -> tuple[int, int]:
    """Smallest and largest integer."""
    return -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1


def choose_scales(weight: Tensor, importance: Tensor, scheme: WeightScheme) -> Tensor:
    """weight [N, K], importance of columns [K] → scales [N, groups], exact in bf16, with the least weighted error."""
    rows = max(1, SEARCHED_AT_ONCE // weight.shape[1])
    return torch.cat([search_scales(part, importance, scheme) for part in torch.split(weight, rows)])


def search_scales(weight: Tensor, importance: Tensor, scheme: WeightScheme) -> Tensor:
    """`choose_scales` of some rows."""
    low, high = limits(scheme)
    groups = weight.reshape(len(weight), -1, scheme.group_size or weight.shape[1])  # [N, groups, columns of one]
    weights = importance.reshape(groups.shape[1:])
    largest = torch.maximum(groups.amax(-1) / high, groups.amin(-1) / low)
    best, least = torch.empty_like(largest), torch.full_like(largest, torch.inf)
    for part in SHRINK:
        scale = (largest * part).clamp(min=SMALLEST_SCALE).bfloat16().float()
        rounded = (groups / scale[..., None]).round_().clamp_(low, high).mul_(scale[..., None])
        error = rounded.sub_(groups).square_().mul_(weights).sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def choose_integers(weight: Tensor, order: Tensor, factor: Tensor, scale: Tensor, scheme: WeightScheme) -> Tensor:
    """weight [N, K], scales [N, groups] → int8 [N, K].

    Columns are taken in `order` [K]; `factor` [K, K] is the inverse factor of the inputs' moments in that order.
    """
    low, high = limits(scheme)
    columns = weight.T[order].contiguous()  # [K, N]
    scales = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1).T[order].contiguous()
    integers = torch.empty_like(columns)
    for begin in range(0, len(columns), BLOCK):
        end = min(begin + BLOCK, len(columns))
        block, errors, inside = columns[begin:end], torch.empty_like(columns[begin:end]), factor[begin:end, begin:end]
        for i in range(end - begin):
            rounded = (block[i] / scales[begin + i]).round_().clamp_(low, high)
            integers[begin + i] = rounded
            errors[i] = (block[i] - rounded * scales[begin + i]) / inside[i, i]
            block[i + 1 :] -= inside[i, i + 1 :, None] * errors[i]
        columns[end:] -= factor[begin:end, end:].T @ errors
    found = torch.empty_like(weight, dtype=torch.int8)
    found[:, order] = integers.T.to(torch.int8)
    return found


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped moments' inverse [K, K]; columns without any input keep to themselves.

    Raises torch.linalg.LinAlgError if they are not positive definite even so.
    """
    damped = moments.double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
