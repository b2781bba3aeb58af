"""A GGUF file (llama.cpp), read with the `gguf` library: shapes and tensors.

Format: ggml `docs/gguf.md`. llama.cpp stores q and k with rotary pairs interleaved; Hugging Face stores the two
halves apart, so both are permuted back (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py).
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from pydantic import ValidationError

from ..errors import ExportError
from ..plan import Architecture, explain
from . import gguf_header, gguf_tokenizer
from .gguf_metadata import Metadata

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What gguf.quants.dequantize knows. It has no public list of them, and says no only when it reads.
READABLE_TYPES = frozenset({
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
    "MXFP4", "NVFP4",
})  # fmt: skip


class GgufSource:
    """One GGUF file of architecture `llama`, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        gguf_header.check(path)
        try:
            self._reader = GGUFReader(path)
        except Exception as error:  # the library raises whatever the damaged bytes lead to
            raise ExportError(f"{path}: damaged GGUF ({one_line(error)}); download it again") from None
        self.metadata = Metadata(path, self._reader)
        self._tensors = {hugging_face_name(tensor.name): tensor for tensor in self._reader.tensors}
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors} - {"F32"}
        self.description = f"GGUF, {' + '.join(sorted(kinds)) or 'F32'}, {len(self._tensors)} tensors"
        size = path.stat().st_size
        for tensor in self._reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise ExportError(f"{path}: tensor {tensor.name} ends after the file's {size} bytes; download it again")
            if tensor.tensor_type.name not in READABLE_TYPES:
                raise ExportError(
                    f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}, which cannot be dequantized; "
                    "use a file in F32, F16, BF16 or Q8_0"
                )

    @cached_property
    def architecture(self) -> Architecture:
        get = self.metadata.get
        self._refuse_other_models()
        heads, hidden = get("llama.attention.head_count", int), get("llama.embedding_length", int)
        try:
            return Architecture(
                vocab_size=self._vocab_size(),
                hidden_size=hidden,
                intermediate_size=get("llama.feed_forward_length", int),
                num_hidden_layers=get("llama.block_count", int),
                num_attention_heads=heads,
                num_key_value_heads=get("llama.attention.head_count_kv", int, heads),
                head_dim=self._head_dim(hidden, heads),
                rope_theta=get("llama.rope.freq_base", float, 10000.0),
                rope_scaling=None,
                # the file stores float32; 1e-5 comes back as 9.99999975e-06
                rms_norm_eps=float(f"{get('llama.attention.layer_norm_rms_epsilon', float):.6g}"),
                tie_word_embeddings="lm_head.weight" not in self._tensors,
                max_position_embeddings=get("llama.context_length", int),
            )
        except ValidationError as error:
            raise ExportError(f"{self.path}: {explain(error)}") from None

    def _refuse_other_models(self) -> None:
        """What our model does not compute."""
        if (kind := self.metadata.get("general.architecture", str)) != "llama":
            raise ExportError(f"{self.path}: general.architecture is {kind!r}; only 'llama' is supported")
        if "rope_freqs.weight" in self._tensors:
            raise ExportError(f"{self.path}: rope_freqs.weight (llama3 RoPE scaling in GGUF) is not read yet")
        if (scaling := self.metadata.get("llama.rope.scaling.type", str, "none")) != "none":
            raise ExportError(f"{self.path}: llama.rope.scaling.type is {scaling!r}; only 'none' is supported")

    def _vocab_size(self) -> int:
        embedding = self.shapes.get("model.embed_tokens.weight")
        if not embedding:
            raise ExportError(f"{self.path}: tensor token_embd.weight is missing or a single number")
        return embedding[0]

    def _head_dim(self, hidden: int, heads: int) -> int:
        """Explicit, or the hidden size shared out; every channel of a head must turn."""
        size = self.metadata.get("llama.attention.key_length", int, hidden // max(heads, 1))
        if (turned := self.metadata.get("llama.rope.dimension_count", int, size)) != size:
            raise ExportError(f"{self.path}: llama.rope.dimension_count is {turned}, but heads have {size} channels")
        return size

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        values = values.reshape(self.shapes[name])
        if name.endswith("q_proj.weight"):
            return halves_apart(values, self.architecture.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return halves_apart(values, self.architecture.num_key_value_heads)
        return values

    def write_tokenizer(self, folder: Path) -> None:
        gguf_tokenizer.write(self.metadata, folder)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
    return NAMES.get(name, name)


def halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads · head_dim, K] with rotary pairs (2i, 2i+1) → pairs (i, i + head_dim/2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
