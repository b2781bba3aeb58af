"""One weight and its inputs' second moments → integers.

GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022) for
symmetric integers: columns are rounded one after another, most important first, and what rounding one did to the
output is taken back by those not yet rounded. Scales belong to fixed groups of columns and are chosen before.

Shapes: N rows (output features), K columns (input features).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from export.plan import Gptq, WeightScheme

from .nearest import Rounded, choose_scales, compared, integer_range

_BLOCK = 64
"""Columns whose errors are spread at once."""


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


def round_linears(
    weights: Sequence[Tensor], schemes: Sequence[WeightScheme], moments: Moments, settings: Gptq
) -> list[Rounded]:
    """Integers and scales of linears with the same inputs, float32 [N, K] each.

    Raises torch.linalg.LinAlgError if the moments are not positive definite even when damped.
    """
    rows = [len(weight) for weight in weights]
    targets = torch.split(target(torch.cat(list(weights)), moments, settings.pull), rows)
    # Errors can only be taken back by columns that come later, so the columns that matter most go first.
    order = moments.inputs.diagonal().argsort(descending=True)
    factor = inverse_factor(moments.inputs[order][:, order], settings.damping)
    rounded: dict[int, Rounded] = {}
    for scheme in dict.fromkeys(schemes):  # rows do not depend on each other: those of one scheme are computed together
        same = [i for i, its_scheme in enumerate(schemes) if its_scheme == scheme]
        stacked = torch.cat([targets[i] for i in same])
        scale = choose_scales(stacked, moments.inputs.diagonal(), scheme)
        integers = choose_integers(stacked, order, factor, scale, scheme)
        parts = (torch.split(tensor, [rows[i] for i in same]) for tensor in (integers, scale))
        for i, qdata, its_scale in zip(same, *parts, strict=True):
            rounded[i] = compared(weights[i], qdata.contiguous(), its_scale.contiguous())
    return [rounded[i] for i in range(len(weights))]


def target(weight: Tensor, moments: Moments, pull: float) -> Tensor:
    """The weight [N, K] that turns the quantized model's inputs into the full model's outputs, by least squares.

    `pull` draws it towards the weight itself, in parts of the mean second moment: few tokens know little.
    """
    # min over T of Σ |W x + d − T x̂|² + λ |W − T|²  has the normal equations  T (Σ x̂ x̂ᵀ + λ) = W Σ x x̂ᵀ + Σ d x̂ᵀ + λ W.
    # The left factor is symmetric, so both sides are transposed and solved by Cholesky.
    strength = pull * moments.inputs.diagonal().mean()
    right = weight @ moments.full + strength * weight
    if moments.drift is not None:
        right += moments.drift
    damped = moments.inputs.clone()
    damped.diagonal().add_(strength)
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(damped)).T.contiguous()


def choose_integers(weight: Tensor, order: Tensor, factor: Tensor, scale: Tensor, scheme: WeightScheme) -> Tensor:
    """weight [N, K], scales [N, groups] → int8 [N, K].

    Columns are taken in `order` [K]; `factor` [K, K] is the inverse factor of the inputs' moments in that order.
    """
    low, high = integer_range(scheme)
    columns = weight.T[order].contiguous()  # [K, N]
    scales = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1).T[order].contiguous()
    integers = torch.empty_like(columns)
    for begin in range(0, len(columns), _BLOCK):
        end = min(begin + _BLOCK, len(columns))
        block, errors, inside = columns[begin:end], torch.empty_like(columns[begin:end]), factor[begin:end, begin:end]
        for i in range(end - begin):
            rounded = (block[i] / scales[begin + i]).round_().clamp_(low, high)
            integers[begin + i] = rounded
            # Row i of the factor over its diagonal is the optimal answer of all later columns to an error in column i.
            errors[i] = (block[i] - rounded * scales[begin + i]) / inside[i, i]
            block[i + 1 :] -= inside[i, i + 1 :, None] * errors[i]
        # Columns beyond the block get the whole block's errors in one matrix product instead of 64 outer products.
        columns[end:] -= factor[begin:end, end:].T @ errors
    in_order = torch.empty_like(weight, dtype=torch.int8)
    in_order[:, order] = integers.T.to(torch.int8)
    return in_order


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped moments' inverse [K, K]; columns without any input keep to themselves.

    The factor of the whole inverse holds, row by row, what GPTQ needs of the inverse over the columns that are left:
    nothing is updated between columns. Computed in float64, returned as float32.

    Raises torch.linalg.LinAlgError if they are not positive definite even so.
    """
    damped = moments.double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
