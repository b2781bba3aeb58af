"""MKL's vector functions, called once by one thread before many threads call them.

Each chooses its kernel in the first call of a process. When several threads make that call at once, one of them can get
a kernel of low accuracy (errors of 1e-4) for its part of the result, silently and only in that call; measured in one of
500 processes (https://github.com/pytorch/pytorch/issues/188792).
"""

import torch

_FUNCTIONS = (
    torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv, torch.exp, torch.expm1,
    torch.log, torch.log1p, torch.log2, torch.log10, torch.sin, torch.sqrt, torch.tan, torch.tanh, torch.trunc
)  # fmt: skip
"""Those that PyTorch gives to MKL, from aten/src/ATen/cpu/vml.h."""


def settle() -> None:
    """Have every kernel chosen; a tensor of one element is computed by one thread."""
    for dtype in (torch.float32, torch.float64):
        for function in _FUNCTIONS:
            function(torch.full((1,), 0.5, dtype=dtype))
