"""A GGUF file (llama.cpp), read with the `gguf` library: shapes and tensors.

Format: ggml `docs/gguf.md`. llama.cpp stores q and k with rotary pairs interleaved; Hugging Face stores the two
halves apart, so both are permuted back (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py).
"""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from pydantic import ValidationError

from ..errors import ExportError
from ..plan import Architecture, RopeScaling, explain
from . import gguf_header, gguf_tokenizer
from .gguf_integers import integers_of
from .gguf_metadata import Metadata
from .integers import Integers, Unfit
from .rope_factors import scaling_of
from .row_order import in_hugging_face_order

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
ROPE_FACTORS = "rope_freqs.weight"
BLOCK_ELEMENTS = 2**22
"""Dequantized at a time: the library holds twice what it gives."""
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
        self.description = f"GGUF, {kinds(self._reader.tensors)}, {len(self._tensors)} tensors"
        size = path.stat().st_size
        for tensor in self._reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise ExportError(f"{path}: tensor {tensor.name} ends after the file's {size} bytes; download it again")
            if tensor.tensor_type.name not in READABLE_TYPES:
                raise ExportError(
                    f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}, which cannot be dequantized; "
                    "use a file in F32, F16, BF16 or Q8_0"
                )
        require_in_order(path, self._reader)

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
                rope_scaling=self._rope_scaling(heads, hidden),
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
        if (kind := self.metadata.get("general.type", str, "model")) != "model":
            raise ExportError(f"{self.path}: general.type is {kind!r}, not a whole model; give the GGUF of the model")
        if (parts := self.metadata.get("split.count", int, 1)) > 1:
            raise ExportError(
                f"{self.path}: one of {parts} parts; join them with `llama-gguf-split --merge` and give the whole file"
            )
        if (scaling := self.metadata.get("llama.rope.scaling.type", str, "none")) != "none":
            raise ExportError(f"{self.path}: llama.rope.scaling.type is {scaling!r}; only 'none' is supported")

    def _vocab_size(self) -> int:
        embedding = self.shapes.get("model.embed_tokens.weight")
        if not embedding:
            raise ExportError(f"{self.path}: tensor token_embd.weight is missing or a single number")
        return embedding[0]

    def _rope_scaling(self, heads: int, hidden: int) -> RopeScaling | None:
        """Llama 3's parameters, of which the file holds only what they do to each frequency."""
        tensor = self._tensors.get(ROPE_FACTORS)
        if tensor is None:
            return None
        table = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        try:
            base = self.metadata.get("llama.rope.freq_base", float, 10000.0)
            return scaling_of(table, base, self._head_dim(hidden, heads))
        except ValueError as error:
            raise ExportError(f"{self.path}: tensor {ROPE_FACTORS} {error}; give a Hugging Face folder") from None

    def _head_dim(self, hidden: int, heads: int) -> int:
        """Explicit, or the hidden size shared out; every channel of a head must turn."""
        size = self.metadata.get("llama.attention.key_length", int, hidden // max(heads, 1))
        if (turned := self.metadata.get("llama.rope.dimension_count", int, size)) != size:
            raise ExportError(f"{self.path}: llama.rope.dimension_count is {turned}, but heads have {size} channels")
        return size

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the weights; the RoPE factors are part of the architecture."""
        return {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
            if name != ROPE_FACTORS
        }

    def read(self, name: str) -> torch.Tensor:
        tensor, shape = self._tensors[name], self.shapes[name]
        values = torch.empty(torch.Size(shape).numel() // shape[-1], shape[-1])  # [rows, columns]
        stored = tensor.data.reshape(len(values), -1)
        step = max(1, BLOCK_ELEMENTS // shape[-1])
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            values.numpy()[rows] = dequantize(stored[rows], tensor.tensor_type)
        return in_hugging_face_order(name, values.view(shape), self.architecture)

    def integers(self, name: str) -> Integers | Unfit | None:
        """As in `Source`: the other types have minima, or levels that are not even."""
        tensor, a = self._tensors[name], self.architecture
        found = integers_of(tensor.data.reshape(self.shapes[name][0], -1), tensor.tensor_type)
        if not isinstance(found, Integers):
            return found
        qdata, scale = (in_hugging_face_order(name, part, a) for part in (found.qdata, found.scale))
        return Integers(qdata, scale, found.bits)

    def write_tokenizer(self, folder: Path) -> None:
        gguf_tokenizer.write(self.metadata, folder)


def require_in_order(path: Path, reader: Any) -> None:
    """Tensors follow each other, padded to the alignment, as llama.cpp's `gguf.cpp` demands; none overlap.

    The library adds offsets without a look: one of 2⁶⁴ − 1 comes out before the data.
    """
    at = 0
    for tensor in reader.tensors:
        offset = int(tensor.field.parts[-1][0])
        if offset != at:
            raise ExportError(f"{path}: tensor {tensor.name} begins at {offset}, expected {at}; download it again")
        at += -(-tensor.n_bytes // int(reader.alignment)) * int(reader.alignment)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
    return NAMES.get(name, name)


def kinds(tensors: list[Any]) -> str:
    """Element types and how often, vectors left out: `Q4_K (157), Q6_K (29)`."""
    found = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(found.items())) or "F32"


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
