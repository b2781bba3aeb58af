"""What an already quantized checkpoint holds of one weight: codes of a scheme without zero points, or why not."""

from dataclasses import dataclass

import torch

from ..plan import Levels


@dataclass(frozen=True)
class Integers:
    """weight[n, k] = level(qdata[n, k]) · scale[n, k // group], exactly as `Source.read` gives it."""

    qdata: torch.Tensor
    """int8 [N, K], within −2^(bits − 1) … 2^(bits − 1) − 1"""
    scale: torch.Tensor
    """float32 [N, K/group], finite"""
    bits: int
    levels: Levels = "even"
    """Even ones are the integers themselves; codes of others are kept less 8 (`export/levels.py`)."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.qdata.shape[1] // self.scale.shape[1]


@dataclass(frozen=True)
class Unfit:
    """Integers that are there and cannot be kept."""

    reason: str
    """For a line of output: `zero points that are not the middle`."""
