"""What a runtime does to a linear's inputs, so that its weights are chosen for it."""

from collections.abc import Callable

import torch
from torch import Tensor


def unchanged(x: Tensor) -> Tensor:
    """Float activations."""
    return x


def int8_per_token(x: Tensor) -> Tensor:
    """Rounded to int8 and back, one scale and zero point per token, as 8da4w on XNNPACK.

    torchao's `choose_qparams_affine` for asymmetric int8: the range always holds 0.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return ((x / scale).round_() + zero).clamp_(-128, 127).sub_(zero).mul_(scale)


ROUND: dict[str, Callable[[Tensor], Tensor]] = {"none": unchanged, "int8-per-token": int8_per_token}
