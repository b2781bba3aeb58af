"""Writers of checkpoints in the forms that people have and stock tools read, one for each form.

Weights are read one tensor at a time under Hugging Face's names; tensors that a form does not round are written bit for
bit.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from export.architecture import Architecture
from export.checkpoints import Checkpoint, meta, tokenizer
from export.checkpoints import gguf as gguf_file
from export.checkpoints.folder import config_json
from export.checkpoints.integers import in_meta_order
from export.errors import ExportError
from export.model import rope_frequencies

_SHARD_BYTES = 1_000_000_000
_BNB_DEFAULTS: dict[str, Any] = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
"""Arguments of bitsandbytes' `quantize_4bit`: NF4 with nested absmax, as Unsloth uploads it."""
_JLAMA_BLOCK = 32


class _Weights(Protocol):
    """What is written: a checkpoint, a source, or anything else with shapes and float32 tensors."""

    @property
    def architecture(self) -> Architecture:
        """Its `tensor_shapes` are what is written, in their order."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, float32."""


# ── Hugging Face folders ────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` when it is complete. Raises ExportError: that exists already."""
    if folder.exists():
        raise ExportError(f"{folder}: exists already; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        partial.chmod(0o755)
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_config(folder: Path, architecture: Architecture, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    """Write config.json; `fields` replace those of the architecture."""
    config = config_json(architecture, dtype) | dict(fields)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_description(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, **fields: Any) -> None:
    """Write a Hugging Face folder without its weights: tokenizer files, and config.json with `fields`."""
    ids = tokenizer.write(checkpoint.source, folder, checkpoint.architecture.vocab_size)
    fields |= {"bos_token_id": ids.bos_id, "eos_token_id": list(ids.eos_ids)}
    write_config(folder, checkpoint.architecture, dtype, fields)


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write files of about 1 GB and their index, with one file in memory at a time."""
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        if shard:
            save_file(shard, folder / file, {"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor
        if sum(part.nbytes for part in shard.values()) > _SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_safetensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write model.safetensors."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def read_all(weights: _Weights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the model, without a tied head."""
    return {name: weights.read(name).to(dtype) for name in weights.architecture.tensor_shapes()}


def bnb_tensors(weights: _Weights, *, skipped: Iterable[str] = (), **options: Any) -> dict[str, torch.Tensor]:
    """Linears in 4 bits with their quant states, by bitsandbytes' own quantizer; the rest in bfloat16.

    `options` of `quantize_4bit` replace NF4 with nested absmax. A linear whose name contains one of `skipped` stays in
    bfloat16.
    """
    from bitsandbytes.functional import quantize_4bit

    tensors = read_all(weights, torch.bfloat16)
    for name in weights.architecture.linear_shapes():
        if name.endswith("_proj.weight") and not any(part in name for part in skipped):
            tensors[name], state = quantize_4bit(tensors[name], **{**_BNB_DEFAULTS, **options})
            tensors |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    return tensors


def write_jlama(weights: _Weights, folder: Path, kind: Literal["Q4", "I8"] = "Q4") -> None:
    """Write model.safetensors as Jlama's `quantize` does: norms as rows of float32, the rest in blocks."""
    parts: dict[str, tuple[str, list[int], bytes]] = {}
    for name in weights.architecture.tensor_shapes():
        weight = weights.read(name)
        if weight.ndim == 1:
            parts[name] = ("F32", [1, len(weight)], weight.numpy().tobytes())
            continue
        codes, scales = jlama_blocks(weight, kind)
        parts[name] = (kind, list(weight.shape), codes)
        parts[f"{name}.qb"] = ("F32", list(scales.shape), scales.numpy().tobytes())
    header, at = {}, 0
    for name, (dtype, shape, data) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data for _, _, data in parts.values())


def jlama_blocks(weight: torch.Tensor, kind: Literal["Q4", "I8"] = "Q4") -> tuple[bytes, torch.Tensor]:
    """[N, K] → codes and float32 scales of either sign [N, K/32].

    `processBlock` of Jlama's Q4ByteBufferTensor.java and Q8ByteBufferTensor.java.
    """
    blocks = weight.view(len(weight), -1, _JLAMA_BLOCK)
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    if kind == "I8":
        scales = largest.abs() / 127
        codes = (blocks / scales).nan_to_num().round().to(torch.int8)
    else:
        scales = largest / -8
        levels = torch.clamp((blocks / scales + 8.5).nan_to_num().to(torch.uint8), max=15)
        codes = levels[..., : _JLAMA_BLOCK // 2] | levels[..., _JLAMA_BLOCK // 2 :] << 4
    return codes.numpy().tobytes(), scales[..., 0].contiguous()


# ── Meta's folder ───────────────────────────────────────────────────────────────────────────────────────────────────


def write_meta(weights: _Weights, folder: Path, dtype: torch.dtype) -> None:
    """Write consolidated.00.pth, which repeats a tied head, and params.json."""
    a = weights.architecture
    params = meta_params(a)
    tensors = {_meta_name(name): in_meta_order(name, weight, a) for name, weight in read_all(weights, dtype).items()}
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def meta_params(a: Architecture) -> dict[str, Any]:
    """params.json of Meta's releases; `hidden_dim` replaces the two numbers that it is derived from there.

    Raises ExportError: ExecuTorch's `apply_scaling` has Llama 3's length and a low frequency factor of 1 built in.
    """
    scaling, length = a.rope_scaling, meta.ORIGINAL_LENGTH
    if scaling and (scaling.original_max_position_embeddings, scaling.low_freq_factor) != (length, 1.0):
        raise ExportError(
            f"rope_scaling {scaling.model_dump()}: export_llm computes only original_max_position_embeddings "
            f"{length} and low_freq_factor 1"
        )
    params = {
        "dim": a.hidden_size,
        "n_layers": a.num_hidden_layers,
        "n_heads": a.num_attention_heads,
        "n_kv_heads": a.num_key_value_heads,
        "head_dim": a.head_dim,
        "hidden_dim": a.intermediate_size,
        "vocab_size": a.vocab_size,
        "norm_eps": a.rms_norm_eps,
        "rope_theta": a.rope_theta,
        "use_scaled_rope": scaling is not None,
    }
    if scaling:
        params |= {"rope_scale_factor": int(scaling.factor), "high_freq_factor": int(scaling.high_freq_factor)}
    return params


def _meta_name(name: str) -> str:
    return _stored_name(name, meta.NAMES, meta.LAYER_NAMES, "layers")


def _stored_name(name: str, top: dict[str, str], modules: dict[str, str], layers: str) -> str:
    """A form's name for Hugging Face's name: the inverse of a reader's tables."""
    inverse = {ours: stored for stored, ours in (top | modules).items()}
    if name in inverse:
        return inverse[name]
    _, _, index, *module, leaf = name.split(".")
    return f"{layers}.{index}.{inverse['.'.join(module)]}.{leaf}"


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file to be written."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """Its numbers, float32 [shape]."""


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
    """Write a file of llama.cpp's architecture `llama`, with one tensor in memory at a time.

    metadata: numbers, texts, lists of them, or fields of another file.
    """
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        stored = gguf.quants.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        writer.write_tensor_data(gguf.quants.quantize(tensor.read().contiguous().numpy(), tensor.kind))
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, gguf.ReaderField):
        element = value.types[-1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value.contents(), value.types[0], element)
    else:
        kind = gguf.GGUFValueType.get_type(value)
        whole = kind is gguf.GGUFValueType.INT32
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if whole else kind)


def gguf_metadata(a: Architecture) -> dict[str, int | float | str]:
    """llama.cpp's keys for the shapes; lengths in tokens. Without a vocabulary, for use with token ids only."""
    return {
        "llama.context_length": a.max_position_embeddings,
        "llama.embedding_length": a.hidden_size,
        "llama.block_count": a.num_hidden_layers,
        "llama.feed_forward_length": a.intermediate_size,
        "llama.attention.head_count": a.num_attention_heads,
        "llama.attention.head_count_kv": a.num_key_value_heads,
        "llama.attention.key_length": a.head_dim,
        "llama.attention.value_length": a.head_dim,
        "llama.rope.dimension_count": a.head_dim,
        "llama.rope.freq_base": a.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": a.rms_norm_eps,
        "llama.vocab_size": a.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }


def gguf_tensors(weights: _Weights, kind: gguf.GGMLQuantizationType) -> dict[str, GgufTensor]:
    """Name in the file → tensor, matrices as `kind`, in llama.cpp's names and row order, with its RoPE factors.

    Vectors stay float32, because llama.cpp computes norms in nothing else (convert_hf_to_gguf.py).
    """
    a = weights.architecture

    def tensor(name: str, shape: tuple[int, ...]) -> GgufTensor:
        stored = kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        return GgufTensor(stored, shape, lambda: in_meta_order(name, weights.read(name), a))

    tensors = {gguf_name(name): tensor(name, shape) for name, shape in a.tensor_shapes().items()}
    if a.rope_scaling:
        factors = rope_factors(a)
        tensors[gguf_file.ROPE_FACTORS] = GgufTensor(gguf.GGMLQuantizationType.F32, factors.shape, lambda: factors)
    return tensors


def rope_factors(a: Architecture) -> torch.Tensor:
    """Divisors of the plain rotary frequencies, as llama.cpp stores Llama 3's scaling: float32 [D/2]."""
    plain = rope_frequencies(a.model_copy(update={"rope_scaling": None}))
    return plain / rope_frequencies(a)


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
    return _stored_name(name, gguf_file.NAMES, gguf_file.BLOCK_NAMES, "blk")
