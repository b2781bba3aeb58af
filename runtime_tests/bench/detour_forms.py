"""A checkpoint as people have it: in 4 bits already, made from float weights by the original tool where it is at hand.

Jlama is Java; its blocks are written here as `Q4ByteBufferTensor.java` makes them. Files hold the tokenizer too.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file

from export import tokenizer
from export.checkpoint import Checkpoint
from export.config_json import config_json
from export.errors import ExportError
from export.manifest import ROOT

from . import gguf_form, processes

JLAMA_BLOCK = 32
NF4_BLOCK = 64


def bf16(source: Checkpoint, folder: Path, _vocabulary: Path) -> Path:
    """What Meta publishes: every weight in bfloat16."""
    save_file({name: source.read(name).bfloat16() for name in shapes(source)}, file_of(folder), {"format": "pt"})
    return with_config(source, folder, {})


def nf4(source: Checkpoint, folder: Path, _vocabulary: Path) -> Path:
    """bitsandbytes' own quantizer, linears as Unsloth uploads them: NF4, nested absmax."""
    from bitsandbytes.functional import quantize_4bit

    tensors: dict[str, torch.Tensor] = {}
    for name in shapes(source):
        tensors[name] = source.read(name).bfloat16()
        if name.endswith("_proj.weight"):
            packed, state = quantize_4bit(
                tensors[name], blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
            )
            tensors[name] = packed
            tensors |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(tensors, file_of(folder), {"format": "pt"})
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    config |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    return with_config(source, folder, {"quantization_config": config})


def jlama(source: Checkpoint, folder: Path, _vocabulary: Path) -> Path:
    """JQ4: embedding and linears in blocks of 32 with float32 scales of either sign."""
    parts: dict[str, tuple[str, list[int], bytes]] = {}
    for name in shapes(source):
        weight = source.read(name)
        if weight.ndim == 1:
            parts[name] = ("F32", [1, len(weight)], weight.numpy().tobytes())
            continue
        codes, scales = jlama_blocks(weight)
        parts[name] = ("Q4", list(weight.shape), codes)
        parts[f"{name}.qb"] = ("F32", list(scales.shape), scales.numpy().tobytes())
    header, at = {}, 0
    for name, (dtype, shape, data) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    with file_of(folder).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data for _, _, data in parts.values())
    return with_config(source, folder, {})


def jlama_blocks(weight: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """[N, K] → nibbles and scales [N, K/32]: `processBlock` of Q4ByteBufferTensor.java."""
    blocks = weight.view(len(weight), -1, JLAMA_BLOCK)
    scales = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / -8
    codes = torch.clamp((blocks / scales + 8.5).nan_to_num().to(torch.uint8), max=15)
    half = JLAMA_BLOCK // 2
    return (codes[..., :half] | codes[..., half:] << 4).numpy().tobytes(), scales[..., 0].contiguous()


def gguf_of(kind: str) -> Callable[[Checkpoint, Path, Path], Path]:
    """llama.cpp's own quantizer."""

    def write(source: Checkpoint, folder: Path, vocabulary: Path) -> Path:
        exact, out = folder / "float32.gguf", folder / f"{kind}.gguf"
        write_float_gguf(source, exact, vocabulary)
        command = (sys.executable, "-m", "runtime_tests.bench.llama_quantize", str(exact), str(out), kind)
        done = processes.run(command, folder / "log", f"llama.cpp {kind}")
        exact.unlink()
        if done.returncode != 0:
            raise ExportError(f"llama.cpp {kind}: {done.last_words}; is llama-cpp-python installed (extra `peers`)?")
        return out

    return write


def write_float_gguf(source: Checkpoint, path: Path, vocabulary: Path) -> None:
    """Weights of `source` in float32 under the metadata of another GGUF of the same shapes, tokenizer included."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, entry in gguf.GGUFReader(vocabulary).fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            array = entry.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1] if array else None)
    for name, values in zip(
        gguf_form.stored_shapes(source.architecture), gguf_form.tensors(source, torch.float32), strict=True
    ):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of every tensor; a tied head is not among them."""
    return source.architecture.tensor_shapes()


def file_of(folder: Path) -> Path:
    """The weights of a Hugging Face folder."""
    return folder / "model.safetensors"


def with_config(source: Checkpoint, folder: Path, more: dict[str, Any]) -> Path:
    """The rest of a Hugging Face folder."""
    ids = tokenizer.write(source.source, folder, source.architecture.vocab_size)
    config = config_json(source.architecture, torch.bfloat16) | more
    config |= {"bos_token_id": ids.bos_id, "eos_token_id": list(ids.eos_ids)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


FORMS: dict[str, tuple[str, Callable[[Checkpoint, Path, Path], Path], str | None]] = {
    "bf16": ("Hugging Face, bf16", bf16, None),
    "q8_0": ("GGUF Q8_0", gguf_of("q8_0"), None),
    "q4_k_m": ("GGUF Q4_K_M", gguf_of("q4_k_m"), None),
    "nf4": ("bitsandbytes NF4 (Unsloth)", nf4, "nf4-exact"),
    "q4_0": ("GGUF Q4_0", gguf_of("q4_0"), "int4-g32-exact"),
    "jlama": ("Jlama Q4", jlama, "int4-g32-exact"),
}
"""Key → name for people, writer, and the recipe that keeps its integers."""


def weight_bytes(place: Path) -> int:
    """Of the checkpoint's weights."""
    return (place if place.is_file() else file_of(place)).stat().st_size


def home(model: str) -> Path:
    """Where a model's forms are kept between runs."""
    return ROOT / "build" / "detours" / model
