"""What an already quantized checkpoint holds of one weight: integers of a symmetric scheme, or why not."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Integers:
    """weight[n, k] = qdata[n, k] · scale[n, k // group], exactly as `Source.read` gives it."""

    qdata: torch.Tensor
    """int8 [N, K], within −2^(bits − 1) … 2^(bits − 1) − 1"""
    scale: torch.Tensor
    """float32 [N, K/group], finite"""
    bits: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.qdata.shape[1] // self.scale.shape[1]


@dataclass(frozen=True)
class Unfit:
    """Integers that are there and cannot be kept."""

    reason: str
    """For a line of output: `zero points that are not the middle`."""
