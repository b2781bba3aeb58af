"""Rows of query and key weights in the order that Meta's code and llama.cpp rotate them. Knows no file format."""

import torch

from export.plan import Architecture


def in_meta_order(name: str, weight: torch.Tensor, a: Architecture) -> torch.Tensor:
    """Query and key rows with rotary pairs together; every other weight as it is."""
    heads = {"self_attn.q_proj.weight": a.num_attention_heads, "self_attn.k_proj.weight": a.num_key_value_heads}
    for suffix, count in heads.items():
        if name.endswith(suffix):
            return pairs_together(weight, count)
    return weight


def pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads · D, K] with rotary pairs (i, i + D/2), as Hugging Face has them → Meta's pairs (2i, 2i+1)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
