"""A GGUF file (llama.cpp), read with the `gguf` library: metadata, tensors, tokenizer and chat template.

Format: ggml `docs/gguf.md`. llama.cpp stores q and k with rotary pairs interleaved; Hugging Face stores the two
halves apart, so both are permuted back (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py).
"""

import json
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
from ..plan import Architecture, explain

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
PRE_TOKENIZERS = ("smollm", "llama-bpe", "llama3", "gpt-2", "default")


class GgufSource:
    """One GGUF file of architecture `llama`, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        try:
            self._reader = GGUFReader(path)
        except Exception as error:  # the library raises whatever the damaged bytes lead to
            raise ExportError(f"{path}: damaged GGUF ({one_line(error)}); download it again") from None
        self._tensors = {hugging_face_name(tensor.name): tensor for tensor in self._reader.tensors}
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors} - {"F32"}
        self.description = f"GGUF, {' + '.join(sorted(kinds)) or 'F32'}, {len(self._tensors)} tensors"
        size = path.stat().st_size
        for tensor in self._reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise ExportError(f"{path}: tensor {tensor.name} ends after the file's {size} bytes; download it again")

    def _get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            if default is None:
                raise ExportError(f"{self.path}: metadata key {key} is missing")
            return default
        return field.contents()

    @cached_property
    def architecture(self) -> Architecture:
        if (kind := self._get("general.architecture")) != "llama":
            raise ExportError(f"{self.path}: general.architecture is {kind!r}; only 'llama' is supported")
        if "rope_freqs.weight" in self._tensors:
            raise ExportError(f"{self.path}: rope_freqs.weight (llama3 RoPE scaling in GGUF) is not read yet")
        heads, hidden = self._get("llama.attention.head_count"), self._get("llama.embedding_length")
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise ExportError(f"{self.path}: tensor token_embd.weight is missing")
        try:
            return Architecture(
                vocab_size=int(embedding.shape[1]),
                hidden_size=hidden,
                intermediate_size=self._get("llama.feed_forward_length"),
                num_hidden_layers=self._get("llama.block_count"),
                num_attention_heads=heads,
                num_key_value_heads=self._get("llama.attention.head_count_kv", heads),
                head_dim=self._get("llama.attention.key_length", hidden // heads),
                rope_theta=self._get("llama.rope.freq_base", 10000.0),
                rope_scaling=None,
                # the file stores float32; 1e-5 comes back as 9.99999975e-06
                rms_norm_eps=float(f"{self._get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
                tie_word_embeddings="lm_head.weight" not in self._tensors,
                max_position_embeddings=self._get("llama.context_length"),
            )
        except ValidationError as error:
            raise ExportError(f"{self.path}: {explain(error)}") from None

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        try:
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        except (NotImplementedError, ValueError) as error:
            raise ExportError(f"{self.path}: tensor {tensor.name}: {one_line(error)}") from None
        values = values.reshape(self.shapes[name])
        if name.endswith("q_proj.weight"):
            return halves_apart(values, self.architecture.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return halves_apart(values, self.architecture.num_key_value_heads)
        return values

    def write_tokenizer(self, folder: Path) -> None:
        """Byte-level BPE from the file's tokens and merges, with the pre-tokenizer the file names."""
        from tokenizers import AddedToken
        from transformers import PreTrainedTokenizerFast

        tokens: list[str] = self._get("tokenizer.ggml.tokens")
        fast = PreTrainedTokenizerFast(
            tokenizer_object=self._tokenizer(tokens),
            bos_token=AddedToken(tokens[self._get("tokenizer.ggml.bos_token_id")], special=True, normalized=False),
            eos_token=AddedToken(tokens[self._get("tokenizer.ggml.eos_token_id")], special=True, normalized=False),
            chat_template=self._get("tokenizer.chat_template", ""),
            clean_up_tokenization_spaces=False,
        )
        fast.save_pretrained(folder)
        eos = self._get("tokenizer.ggml.eos_token_id")
        bos = self._get("tokenizer.ggml.bos_token_id")
        (folder / "generation_config.json").write_text(
            json.dumps({"bos_token_id": bos, "eos_token_id": eos}, indent=2) + "\n"
        )

    def _tokenizer(self, tokens: list[str]) -> Any:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        kind, pre = self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or pre not in PRE_TOKENIZERS:
            raise ExportError(
                f"{self.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
                "give a Hugging Face folder with tokenizer.json"
            )
        merges = [tuple(merge.split(" ", 1)) for merge in self._get("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in ("llama-bpe", "llama3"))
        first: Any = None
        if pre == "smollm":  # llama.cpp: LLAMA_VOCAB_PRE_TYPE_SMOLLM splits every digit
            first = pre_tokenizers.Digits(individual_digits=True)
        elif pre in ("llama-bpe", "llama3"):
            first = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level]) if first else byte_level
        tokenizer.decoder = decoders.ByteLevel()
        control = [
            token for token, kind in zip(tokens, self._get("tokenizer.ggml.token_type"), strict=True) if kind == 3
        ]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        return tokenizer


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
