"""One float weight → torchao integers and scales, rounded to nearest, a block of rows at a time.

The common scheme every runtime holds exactly: symmetric integers, one scale per group or channel, the scale rounded
to bf16 *before* the integers are chosen (bf16 scales of at least 2⁻¹⁷ are exact in fp16 and fp32 too).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log10

import torch

from export.checkpoints.integers import values_of
from export.host import memory, processor
from export.plan import Levels, WeightScheme

from .spread import by_rows, spread

SMALLEST_SCALE = 2.0**-17
BLOCK_ELEMENTS = 2**21  # a few MB per temporary, so that a 1 GB embedding costs no more than its integers
ROUNDING_BYTES = 50
"""What rounding holds for each element of a block, measured: the block in float32 a dozen times over."""
_SHARE_OF_FREE = 8
"""Blocks side by side take no more than such a part of the free memory, however many processors there are."""
_SEARCHED_AT_ONCE = 2**18
"""Elements whose scales are searched together: they stay in a core's cache for all tries."""
_SHRINK = [0.6 + 0.05 * i for i in range(10)]
"""Scales that are tried, in parts of the smallest one that clips nothing."""
_NEARBY = [-0.033, -0.022, -0.011, 0.011, 0.022, 0.033]
"""Then those this far from the best of them: 16 tries leave 0.25 % less error than 46 evenly spaced ones."""
INT_TYPES: dict[int, torch.dtype] = {4: torch.int4, 8: torch.int8}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Rounded:
    """Integers, scales, and what rounding cost."""

    qdata: torch.Tensor
    """int8 [N, K]"""
    scale: torch.Tensor
    """float32 [N, K/group], each exact in bf16 and fp16 unless they are a checkpoint's own"""
    signal: float
    """Σ weight²."""
    noise: float
    """Σ (dequantized − weight)²."""
    max_abs_error: float

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of the weight itself."""
        return 10 * log10(max(self.signal, 1e-30) / max(self.noise, 1e-30))

    def cpu(self) -> "Rounded":
        """A copy in the memory of the CPU."""
        return replace(self, qdata=self.qdata.cpu(), scale=self.scale.cpu())

    def dequantized(self) -> torch.Tensor:
        """float32 [N, K]."""
        return self.qdata * self.scale.repeat_interleave(self.qdata.shape[1] // self.scale.shape[1], 1)


def integer_range(scheme: WeightScheme) -> tuple[int, int]:
    """Smallest and largest integer."""
    return -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1


def compared(weight: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, levels: Levels = "even") -> Rounded:
    """Codes int8 [N, K] and scales float32 [N, K/group], however they were chosen, with their error."""
    error = values_of(qdata, levels) * scale.repeat_interleave(qdata.shape[1] // scale.shape[1], 1) - weight
    signal, noise = (float(torch.linalg.vector_norm(x)) ** 2 for x in (weight, error))
    return Rounded(qdata, scale, signal, noise, float(error.abs().max()))


def round_to_nearest(weight: torch.Tensor, scheme: WeightScheme) -> Rounded:
    """weight float32 [N, K]. Rows are independent, so blocks of them run side by side."""
    pieces = torch.split(weight, rows_at_once(weight))
    blocks = spread(lambda rows: _round_block(rows, scheme), pieces, workers=blocks_at_once())
    return joined(torch.cat([block.qdata for block in blocks]), torch.cat([block.scale for block in blocks]), blocks)


def blocks_at_once() -> int:
    """How many blocks are rounded side by side: one for each processor that may be used, as far as memory reaches."""
    fitting = memory.free().bytes // _SHARE_OF_FREE // (ROUNDING_BYTES * BLOCK_ELEMENTS)
    return max(1, min(processor.usable(), fitting))


def rows_at_once(weight: torch.Tensor) -> int:
    """How many rows of a weight [N, K] make a block."""
    return max(1, BLOCK_ELEMENTS // weight.shape[1])


def joined(qdata: torch.Tensor, scale: torch.Tensor, blocks: Sequence[Rounded]) -> Rounded:
    """Codes and scales of a whole weight, with the errors of its blocks of rows."""
    return Rounded(
        qdata,
        scale,
        signal=sum(block.signal for block in blocks),
        noise=sum(block.noise for block in blocks),
        max_abs_error=max(block.max_abs_error for block in blocks),
    )


def _round_block(weight: torch.Tensor, scheme: WeightScheme) -> Rounded:
    # two seconds, which processes that only read integers need not wait
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType
    from torchao.quantization.quant_primitives import choose_qparams_affine

    block = (1, scheme.group_size or weight.shape[-1])
    low, high = integer_range(scheme)
    scale, zero = choose_qparams_affine(
        weight,
        MappingType.SYMMETRIC_NO_CLIPPING_ERR,  # the whole range −8…7: a quarter less KL than SYMMETRIC's ±7.5
        block,
        target_dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        eps=SMALLEST_SCALE,
        zero_point_dtype=torch.int8,
        keepdim=True,
    )
    rounded = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        block,
        INT_TYPES[scheme.bits],
        intx_choose_qparams_algorithm=None,
        custom_scale=scale.to(torch.bfloat16).to(torch.float32),
        custom_zero_point=zero,
    )
    return compared(weight, rounded.qdata, rounded.scale)


# ── scales with the least weighted error ────────────────────────────────────────────────────────────────────────────
# A column's weight is Σ x² of the input that it multiplies, over calibration text: an error e in it changes the output
# by e · x, so to first order (inputs uncorrelated) Σ x² · e² is what the linear loses.


def best_scales(weight: torch.Tensor, importance: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """weight [N, K], importance of columns [K] → scales [N, groups], exact in bf16, with the least weighted error."""
    rows = max(1, _SEARCHED_AT_ONCE // weight.shape[1])
    return by_rows(lambda block: _best_in_block(block, importance, scheme), weight, at_once=rows)


def _best_in_block(weight: torch.Tensor, importance: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    low, high = integer_range(scheme)
    groups = weight.reshape(len(weight), -1, scheme.group_size or weight.shape[1])  # [N, groups, columns of a group]
    group_importance = importance.reshape(groups.shape[1:])
    # the range −8 … 7 is uneven: whichever end a group reaches first decides (smallest and low are both negative)
    unclipped = torch.maximum(groups.amax(-1) / high, groups.amin(-1) / low)
    best, least = torch.ones_like(unclipped), torch.full_like(unclipped, torch.inf)

    def scale_of(part: torch.Tensor) -> torch.Tensor:
        return (unclipped * part).clamp(min=SMALLEST_SCALE).bfloat16().float()

    def attempt(part: torch.Tensor) -> None:
        # errors are measured at the bf16 value that will be stored, not at the one before rounding
        scale = scale_of(part)[..., None]
        rounded = (groups / scale).round_().clamp_(low, high).mul_(scale)
        error = rounded.sub_(groups).square_().mul_(group_importance).sum(-1)
        better = error < least
        torch.where(better, part, best, out=best)
        torch.where(better, error, least, out=least)

    for part in _SHRINK:
        attempt(torch.full_like(unclipped, part))
    found = best.clone()
    for distance in _NEARBY:
        attempt(found + distance)
    return scale_of(best)


def round_at_best_scales(weight: torch.Tensor, importance: torch.Tensor, scheme: WeightScheme) -> Rounded:
    """weight [N, K], importance of its columns [K]: the integers nearest to it at scales of least weighted error."""
    scale = best_scales(weight, importance, scheme)
    columns = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return compared(weight, (weight / columns).round_().clamp_(*integer_range(scheme)).to(torch.int8), scale)
