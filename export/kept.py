"""Integers that a checkpoint holds already, taken as they are where the recipe's scheme can hold them.

Chosen with more care than rounding to nearest, they would lose by being rounded again. `fitted` changes their scales:
rounded to bf16 (`export/rounding.py` says why), repeated where the recipe's groups are smaller. `exactly` changes
nothing, for a runtime that multiplies by any number.
"""

import torch

from .plan import WeightScheme
from .rounding import BLOCK_ELEMENTS, SMALLEST_SCALE, Rounded, compared
from .sources.integers import Integers, Unfit

LARGEST_SCALE = torch.finfo(torch.float16).max


def fitted(held: Integers | Unfit | None, scheme: WeightScheme) -> Integers | Unfit | None:
    """The same integers with scales of the recipe's groups, exact in bf16 and fp16; or why they cannot be kept."""
    if not isinstance(held, Integers):
        return held
    group = scheme.group_size or held.qdata.shape[1]
    if held.bits != scheme.bits:
        return Unfit(f"{held.bits} bits do not fit a recipe of {scheme.bits}")
    if held.group_size % group:
        return Unfit(f"groups of {held.group_size} do not fit recipe groups of {group}")
    scale = held.scale.bfloat16().float()
    if bool((scale < 0).any()):
        return Unfit("negative scales, which only onnxruntime multiplies by (int4-g32-exact on onnx-cpu keeps them)")
    if not SMALLEST_SCALE <= float(scale.min()) <= float(scale.max()) <= LARGEST_SCALE:
        return Unfit("scales outside 2^-17 … 65504")
    return Integers(held.qdata, scale.repeat_interleave(held.group_size // group, dim=1), held.bits)


def exactly(held: Integers | Unfit | None, scheme: WeightScheme) -> Integers | Unfit:
    """The same integers and the same scales, repeated where the recipe's groups are smaller; or why not."""
    if held is None:
        return Unfit("floats, or integers with minima or uneven levels")
    if isinstance(held, Unfit):
        return held
    group = scheme.group_size or held.qdata.shape[1]
    if held.bits > scheme.bits:
        return Unfit(f"{held.bits} bits do not fit a recipe of {scheme.bits}")
    if held.group_size % group:
        return Unfit(f"groups of {held.group_size} do not fit recipe groups of {group}")
    return Integers(held.qdata, held.scale.repeat_interleave(held.group_size // group, dim=1), held.bits)


def compared_with(weight: torch.Tensor, integers: Integers) -> Rounded:
    """What the checkpoint's own weight [N, K] loses, in blocks of rows."""
    rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    blocks = zip(*(torch.split(part, rows) for part in (weight, integers.qdata, integers.scale)), strict=True)
    parts = [compared(*block) for block in blocks]
    return Rounded(
        qdata=integers.qdata,
        scale=integers.scale,
        signal=sum(part.signal for part in parts),
        noise=sum(part.noise for part in parts),
        max_abs_error=max(part.max_abs_error for part in parts),
    )
