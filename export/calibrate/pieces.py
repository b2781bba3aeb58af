"""Calibration windows are computed a few at a time, so that memory does not grow with the text."""

from collections.abc import Iterator

import torch
from torch import Tensor

WINDOWS_AT_ONCE = 4


def pieces(x: Tensor) -> Iterator[Tensor]:
    """Views of some windows at a time, of x [W, …]."""
    return iter(torch.split(x, WINDOWS_AT_ONCE))
