"""Integers that a checkpoint holds already, taken as they are where the recipe's scheme can hold them.

Chosen with more care than rounding to nearest, they would lose by being rounded again. `fitted` changes their scales:
rounded to bf16 (`export/rounding.py` says why), repeated where the recipe's groups are smaller. `exactly` changes
nothing, for a runtime that multiplies by any number.
"""

from dataclasses import replace

import torch

from .plan import WeightScheme
from .rounding import BLOCK_ELEMENTS, SMALLEST_SCALE, Rounded, compared
from .sources.integers import Integers, Unfit

LEVELS = {"even": "integers", "nf4": "NF4 levels", "fp4": "FP4 levels"}
LARGEST_SCALE = torch.finfo(torch.float16).max


def fitted(held: Integers | Unfit | None, scheme: WeightScheme) -> Integers | Unfit | None:
    """The same integers with scales of the recipe's groups, exact in bf16 and fp16; or why they cannot be kept.

    None: there are none.
    """
    if not isinstance(held, Integers):
        return held
    group = scheme.group_size or held.qdata.shape[1]
    if held.bits != scheme.bits:
        return Unfit(f"{held.bits} bits do not fit a recipe of {scheme.bits}")
    if unlike := misfit(held, scheme):
        return unlike
    scale = held.scale.bfloat16().float()
    if bool((scale < 0).any()):
        return Unfit("negative scales, which only onnxruntime multiplies by (int4-g32-exact on onnx-cpu keeps them)")
    if not SMALLEST_SCALE <= float(scale.min()) <= float(scale.max()) <= LARGEST_SCALE:
        return Unfit("scales outside 2^-17 … 65504")
    return Integers(held.qdata, scale.repeat_interleave(held.group_size // group, dim=1), held.bits)


def exactly(held: Integers | Unfit | None, scheme: WeightScheme) -> Integers | Unfit | None:
    """The same codes and the same scales, repeated where the recipe's groups are smaller; or why not. None: floats."""
    if not isinstance(held, Integers):
        return held
    group = scheme.group_size or held.qdata.shape[1]
    if held.bits > scheme.bits:
        return Unfit(f"{held.bits} bits do not fit a recipe of {scheme.bits}")
    if unlike := misfit(held, scheme):
        return unlike
    return replace(held, scale=held.scale.repeat_interleave(held.group_size // group, dim=1))


def misfit(held: Integers, scheme: WeightScheme) -> Unfit | None:
    """Levels or groups that the scheme does not have."""
    if held.levels != scheme.levels:
        return Unfit(f"{LEVELS[held.levels]} do not fit a recipe of {LEVELS[scheme.levels]}")
    group = scheme.group_size or held.qdata.shape[1]
    if held.group_size % group:
        return Unfit(f"groups of {held.group_size} do not fit recipe groups of {group}")
    return None


def compared_with(weight: torch.Tensor, integers: Integers) -> Rounded:
    """What the checkpoint's own weight [N, K] loses, in blocks of rows."""
    rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    parts = (weight, integers.qdata, integers.scale)
    blocks = zip(*(torch.split(part, rows) for part in parts), strict=True)
    found = [compared(w, q, scale, integers.levels) for w, q, scale in blocks]
    return Rounded(
        qdata=integers.qdata,
        scale=integers.scale,
        signal=sum(part.signal for part in found),
        noise=sum(part.noise for part in found),
        max_abs_error=max(part.max_abs_error for part in found),
    )
