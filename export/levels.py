"""What a 4-bit code stands for: evenly spaced integers, or the sixteen levels of bitsandbytes' NF4 and FP4.

Tables as float32, of bitsandbytes `backends/utils.py`; onnxruntime's MatMulBnb4 (`blockwise_quant_block_bnb4.h`) has
the same. Codes are kept less 8, so that all fit the same signed nibble.
"""

import torch

from .plan import Levels

OFFSET = 8
"""A code less this is what we keep."""
TABLES: dict[Levels, torch.Tensor] = {
    "nf4": torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]),
    "fp4": torch.tensor([
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ]),
}  # fmt: skip


def values_of(qdata: torch.Tensor, levels: Levels) -> torch.Tensor:
    """int8 [N, K] → float32 [N, K], to be multiplied by the scales."""
    return qdata.float() if levels == "even" else TABLES[levels][qdata.int() + OFFSET]
