"""Rows of query and key weights: Meta and llama.cpp rotate pairs (2i, 2i+1), Hugging Face pairs (i, i + D/2)."""

import torch

from ..plan import Architecture


def in_hugging_face_order(name: str, weight: torch.Tensor, a: Architecture) -> torch.Tensor:
    """Query and key rows with rotary halves apart; every other weight as it is. `name` is Hugging Face's."""
    heads = {"self_attn.q_proj.weight": a.num_attention_heads, "self_attn.k_proj.weight": a.num_key_value_heads}
    for suffix, count in heads.items():
        if name.endswith(suffix):
            return halves_apart(weight, count)
    return weight


def halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads · D, K] with rotary pairs (2i, 2i+1) → pairs (i, i + D/2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
