"""A checkpoint as a GGUF file of llama.cpp's architecture `llama`, its weights bit for bit. Knows no quantization.

Names, row order and RoPE factors as llama.cpp's convert_hf_to_gguf.py writes them. The file holds no vocabulary: the
benchmark feeds token ids, and size and load time then compare with artifacts whose tokenizer lies beside the model.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.model import rope_frequencies
from export.plan import Architecture
from export.sources.gguf_file import BLOCK_NAMES, NAMES

from .row_order import in_meta_order

FILE = "model.gguf"
TOP = {ours: theirs for theirs, ours in NAMES.items()}
BLOCK = {ours: theirs for theirs, ours in BLOCK_NAMES.items()}
ROPE_FACTORS = "rope_freqs.weight"


def write(source: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    """Write `model.gguf` with matrices in `dtype` (bfloat16 or float32); one tensor in memory at a time."""
    a = source.architecture
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    add_metadata(writer, a)
    for name, shape in stored_shapes(a).items():
        kind = stored_kind(shape, dtype)
        number = np.dtype(np.int16 if kind is gguf.GGMLQuantizationType.BF16 else np.float32)
        writer.add_tensor_info(name, shape, number, int(np.prod(shape)) * number.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in tensors(source, dtype):
        writer.write_tensor_data(values)
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, a: Architecture) -> None:
    """What llama.cpp needs to know of the shapes; lengths in tokens."""
    writer.add_context_length(a.max_position_embeddings)
    writer.add_embedding_length(a.hidden_size)
    writer.add_block_count(a.num_hidden_layers)
    writer.add_feed_forward_length(a.intermediate_size)
    writer.add_head_count(a.num_attention_heads)
    writer.add_head_count_kv(a.num_key_value_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(a.rope_theta)
    writer.add_layer_norm_rms_eps(a.rms_norm_eps)
    writer.add_vocab_size(a.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def stored_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Name in the file → shape, in the order of the file."""
    shapes = {gguf_name(name): shape for name, shape in a.tensor_shapes().items()}
    return shapes | ({ROPE_FACTORS: (a.head_dim // 2,)} if a.rope_scaling else {})


def tensors(source: Checkpoint, dtype: torch.dtype) -> Iterator[NDArray[np.generic]]:
    """The numbers of `stored_shapes`, one after another."""
    a = source.architecture
    for name, shape in a.tensor_shapes().items():
        weight = in_meta_order(name, source.read(name), a).contiguous()
        if stored_kind(shape, dtype) is gguf.GGMLQuantizationType.BF16:
            yield weight.bfloat16().view(torch.int16).numpy()
        else:
            yield weight.numpy()
    if a.rope_scaling:
        yield rope_factors(a).numpy()


def stored_kind(shape: tuple[int, ...], dtype: torch.dtype) -> gguf.GGMLQuantizationType:
    """Vectors stay float32: llama.cpp computes norms with nothing else."""
    bf16 = dtype is torch.bfloat16 and len(shape) > 1
    return gguf.GGMLQuantizationType.BF16 if bf16 else gguf.GGMLQuantizationType.F32


def rope_factors(a: Architecture) -> torch.Tensor:
    """By how much each rotation is slowed, float32 [D/2]: llama.cpp divides its plain frequencies by this."""
    plain = rope_frequencies(a.model_copy(update={"rope_scaling": None}))
    return plain / rope_frequencies(a)


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
    if name in TOP:
        return TOP[name]
    _, _, index, *module, leaf = name.split(".")
    return f"blk.{index}.{BLOCK['.'.join(module)]}.{leaf}"
