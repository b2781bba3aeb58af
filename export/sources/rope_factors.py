"""Llama 3's RoPE scaling out of the table that a GGUF keeps of it. Knows no files.

llama.cpp's converter (`LlamaModel.generate_extra_tensors` in convert_hf_to_gguf.py) stores by how much each frequency
is slowed, not the four numbers that decide it. Two of them are the same in every Llama 3; the others can be told.
"""

import math

import torch

from ..model import scale_frequencies
from ..plan import RopeScaling

LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1.0, 4.0
TOLERANCE = 1e-5
"""Relative; the table is float32."""


def scaling_of(table: torch.Tensor, theta: float, head_dim: int) -> RopeScaling | None:
    """float32 [head_dim / 2] of slowing factors → the scaling that gives them; None when nothing is slowed.

    Raises ValueError: not a table of Llama 3's kind.
    """
    if head_dim < 2 or table.shape != (head_dim // 2,):
        raise ValueError(f"has shape {list(table.shape)}, heads have {head_dim // 2} rotary pairs")
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"goes with a frequency base of {theta}")
    if not (table.isfinite().all() and table.min() > 0 and table.max() < 1e6):
        raise ValueError("holds numbers that are no slowing factors")
    if torch.equal(table, torch.ones_like(table)):
        return None
    plain = theta ** -(torch.arange(0, head_dim, 2) / head_dim)  # radians per position
    factor = float(f"{table.max().item():.6g}")
    # where slowed in part: 1 / table = (1 - blend) / factor + blend
    blend = (1 / table.double() - 1 / factor) / (1 - 1 / factor)
    partly = (blend > TOLERANCE) & (blend < 1 - TOLERANCE)
    if factor <= 1 or not partly.any():
        raise ValueError("is not Llama 3's RoPE scaling")
    lengths = (blend * (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR) + LOW_FREQ_FACTOR) * 2 * math.pi / plain
    found = RopeScaling(
        factor=factor,
        low_freq_factor=LOW_FREQ_FACTOR,
        high_freq_factor=HIGH_FREQ_FACTOR,
        original_max_position_embeddings=max(1, round(lengths[partly].median().item())),
    )
    if ((plain / scale_frequencies(plain, found) - table).abs() > TOLERANCE * table).any():
        raise ValueError("is not Llama 3's RoPE scaling")
    return found
