"""One weight and its inputs' second moments → integers.

GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022) for
symmetric integers: columns are rounded one after another, most important first, and what rounding one did to the
output is taken back by those not yet rounded. Scales belong to fixed groups of columns and are chosen before.

Shapes: N rows (output features), K columns (input features).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from export.plan import Gptq, WeightScheme

from .nearest import Rounded, best_scales, compared, integer_range
from .spread import blocks, by_rows, spread

_COLUMNS = 64
"""Columns whose errors are spread at once."""
_FACTORED = 512
"""Columns that are factored at once."""
_ROWS = 1024
"""Rows whose integers are chosen at once: a column takes as long for few rows as for these."""


@dataclass(frozen=True)
class Moments:
    """Σ over calibration tokens, float32."""

    inputs: Tensor
    """[K, K]  Σ x̂ x̂ᵀ of the quantized model's inputs x̂."""
    lost: Tensor
    """[N, K]  Σ (y − W x̂) x̂ᵀ, where y is what the linears should give for x̂, and W x̂ what they give unrounded."""


def round_linears(
    weights: Sequence[Tensor], schemes: Sequence[WeightScheme], moments: Moments, settings: Gptq
) -> list[Rounded]:
    """Integers and scales of linears with the same inputs, float32 [N, K] each; `moments.lost` has all their rows.

    Raises torch.linalg.LinAlgError if the moments are not positive definite even when damped.
    """
    # Errors can only be taken back by columns that come later, so the columns that matter most go first.
    mean = moments.inputs.diagonal().mean()
    strength = settings.damping * torch.where(mean > 0, mean, 1)
    importance = moments.inputs.diagonal() + strength
    order = importance.argsort(descending=True, stable=True)
    factor = inverse_factor(moments.inputs[order][:, order], strength)
    weight = torch.cat(list(weights))
    aims = by_rows(lambda w, lost: target(w, lost, order, factor), weight, moments.lost)
    rounded: dict[int, Rounded] = {}
    rows = [len(weight) for weight in weights]
    targets = torch.split(aims, rows)
    for scheme in dict.fromkeys(schemes):  # rows do not depend on each other: those of one scheme are computed together
        same = [i for i, its_scheme in enumerate(schemes) if its_scheme == scheme]
        stacked = torch.cat([targets[i] for i in same])
        scale = best_scales(stacked, importance, scheme)
        choose = partial(choose_integers, order=order, factor=factor, scheme=scheme)
        integers = by_rows(choose, stacked, scale, at_once=_ROWS)
        parts = (torch.split(tensor, [rows[i] for i in same]) for tensor in (integers, scale))
        for i, qdata, its_scale in zip(same, *parts, strict=True):
            rounded[i] = compared(weights[i], qdata.contiguous(), its_scale.contiguous())
    return [rounded[i] for i in range(len(weights))]


def target(weight: Tensor, lost: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """The weight [N, K] that makes of the quantized model's inputs what is wanted, by least squares.

    It is drawn towards the given weight with the strength that `factor` has: few tokens know little. `factor` [K, K] is
    the inverse factor of the inputs' moments in `order` [K]: the rounding that follows judges errors as this does.
    """
    # min over T of Σ |y − T x̂|² + λ |W − T|²  has the solution  T = W + Σ (y − W x̂) x̂ᵀ (Σ x̂ x̂ᵀ + λ)⁻¹
    # The factor is triangular: only columns from `now` on are not multiplied by zero there, and then those before.
    columns, ordered = blocks(len(factor), _FACTORED), lost[:, order]
    halfway, answer = torch.empty_like(weight), torch.empty_like(weight)
    for now in columns:
        halfway[:, now] = ordered[:, now.start :] @ factor[now, now.start :].T
    for now in columns:
        answer[:, order[now]] = halfway[:, : now.stop] @ factor[: now.stop, now]
    return answer.add_(weight)


def choose_integers(weight: Tensor, scale: Tensor, order: Tensor, factor: Tensor, scheme: WeightScheme) -> Tensor:
    """weight [N, K], scales [N, groups] → int8 [N, K].

    Columns are taken in `order` [K]; `factor` [K, K] is the inverse factor of the inputs' moments in that order.
    """
    low, high = integer_range(scheme)
    columns = weight.T[order].contiguous()  # [K, N]
    scales = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1).T[order].contiguous()
    integers = torch.empty_like(columns)
    for begin in range(0, len(columns), _COLUMNS):
        now = slice(begin, min(begin + _COLUMNS, len(columns)))
        block, inside, errors = columns[now], factor[now, now], torch.empty_like(columns[now])
        rows = zip(block, scales[now], integers[now], errors, inside.diagonal(), strict=True)
        for i, (column, its_scale, integer, error, diagonal) in enumerate(rows, start=1):
            torch.div(column, its_scale, out=integer).round_().clamp_(low, high)
            # Row i of the factor over its diagonal is the optimal answer of all later columns to an error in column i.
            torch.addcmul(column, integer, its_scale, value=-1, out=error).div_(diagonal)
            block[i:].addr_(inside[i - 1, i:], error, alpha=-1)
        # Columns beyond the block get the whole block's errors in one matrix product instead of 64 outer products.
        columns[now.stop :] -= factor[now, now.stop :].T @ errors
    in_order = torch.empty_like(weight, dtype=torch.int8)
    in_order[:, order] = integers.T.to(torch.int8)
    return in_order


def inverse_factor(moments: Tensor, strength: Tensor) -> Tensor:
    """Upper V [K, K] with Vᵀ V the inverse of the moments plus `strength` on their diagonal.

    It holds, row by row, what GPTQ needs of the inverse over the columns that are left: nothing is updated between
    columns. Columns without any input keep to themselves.

    Raises torch.linalg.LinAlgError if that is not positive definite.
    """
    # Of the moments with rows and columns in reverse, L Lᵀ, the inverse is L⁻ᵀ L⁻¹, and V is L⁻¹ in reverse. Float32
    # is enough: no eigenvalue is smaller than `strength` or larger than the trace, K / damping times that.
    reverse = moments.flip(0, 1)
    reverse.diagonal().add_(strength)
    return _inverse_of_lower(_cholesky(reverse)).flip(0, 1)


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower factor, in place of the matrix's lower half, a block of columns after another."""
    device = matrix.device.type
    for now in blocks(len(matrix), _FACTORED):
        corner = matrix[now, now] = torch.linalg.cholesky(matrix[now, now])
        below = [slice(now.stop + rows.start, now.stop + rows.stop) for rows in _below(now, matrix)]

        def solve(rows: slice, now: slice = now, corner: Tensor = corner) -> None:
            matrix[rows, now] = torch.linalg.solve_triangular(corner.T, matrix[rows, now], upper=True, left=False)

        def update(rows: slice, now: slice = now) -> None:
            done = matrix[now.stop : rows.stop, now]
            matrix[rows, now.stop : rows.stop] -= matrix[rows, now] @ done.T

        spread(solve, below, device)
        spread(update, below, device)
    return matrix


def _below(now: slice, matrix: Tensor) -> list[slice]:
    return blocks(len(matrix) - now.stop, _FACTORED) if now.stop < len(matrix) else []


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, a block of rows after another."""
    inverse = torch.zeros_like(lower)
    for now in blocks(len(lower), _FACTORED):
        eye = torch.eye(now.stop - now.start, device=lower.device)
        corner = torch.linalg.solve_triangular(lower[now, now], eye, upper=False)
        inverse[now, now] = corner

        def fill(columns: slice, now: slice = now, corner: Tensor = corner) -> None:
            before = lower[now, columns.start : now.start] @ inverse[columns.start : now.start, columns]
            inverse[now, columns] = -corner @ before

        if now.start:
            spread(fill, blocks(now.start, _FACTORED), lower.device.type)
    return inverse
