"""A checkpoint in the forms that people have and that stock exporters read.

Quantized forms are made from float weights by the original tool where it is at hand; Jlama is Java, so its blocks are
written here. Files hold the tokenizer too.

python -m runtime_tests.bench.forms huggingface|meta|gguf OUT ARTIFACT [SOURCE]    into an existing folder
"""

import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType

from export import manifest
from export.checkpoints import Checkpoint
from export.manifest import ROOT
from export.toolbox import writers
from runtime_tests.checks.weights import checkpoint_of

from . import exports


def write_hugging_face(source: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """config.json, model.safetensors and the tokenizer; without a dtype weights are equal bit for bit."""
    dtype = dtype or exact_dtype(source)
    writers.write_safetensors(writers.read_all(source, dtype), folder)
    writers.write_description(source, folder, dtype)
    return folder


def _bf16(source: Checkpoint, folder: Path, _vocabulary: Path) -> Path:
    """As Meta publishes the weights."""
    return write_hugging_face(source, folder, torch.bfloat16)


def _nf4(source: Checkpoint, folder: Path, _vocabulary: Path) -> Path:
    """Linears as Unsloth uploads them: NF4, nested absmax."""
    writers.write_safetensors(writers.bnb_tensors(source), folder)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    config |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    writers.write_description(source, folder, torch.bfloat16, quantization_config=config)
    return folder


def _jlama(source: Checkpoint, folder: Path, _vocabulary: Path) -> Path:
    """JQ4: embedding and linears in blocks of 32 with float32 scales of either sign."""
    writers.write_jlama(source, folder)
    writers.write_description(source, folder, torch.bfloat16)
    return folder


def _gguf_of(kind: str) -> Callable[[Checkpoint, Path, Path], Path]:
    def write(source: Checkpoint, folder: Path, vocabulary: Path) -> Path:
        exports.require_installed(["llama-cpp-python"])
        exact, out = folder / "float32.gguf", folder / f"{kind}.gguf"
        write_float_gguf(source, exact, vocabulary)
        arguments = ("-m", "runtime_tests.bench.runners.llamacpp", str(exact), str(out), kind)
        exports.run(arguments, folder / "log", f"llama.cpp {kind}")
        exact.unlink()
        return out

    return write


def write_float_gguf(source: Checkpoint, path: Path, vocabulary: Path) -> None:
    """Weights of `source` in float32 under the metadata of another GGUF of the same shapes, tokenizer included."""
    fields = gguf.GGUFReader(vocabulary).fields
    replaced = ("general.architecture", "general.file_type")
    metadata = {key: fields[key] for key in fields if not key.startswith("GGUF.") and key not in replaced}
    writers.write_gguf(path, metadata, writers.gguf_tensors(source, gguf.GGMLQuantizationType.F32))


DETOUR_FORMS: dict[str, tuple[str, Callable[[Checkpoint, Path, Path], Path], str | None]] = {
    "bf16": ("Hugging Face, bf16", _bf16, None),
    "q8_0": ("GGUF Q8_0", _gguf_of("q8_0"), None),
    "q4_k_m": ("GGUF Q4_K_M", _gguf_of("q4_k_m"), None),
    "nf4": ("bitsandbytes NF4 (Unsloth)", _nf4, "nf4-exact"),
    "q4_0": ("GGUF Q4_0", _gguf_of("q4_0"), "int4-g32-exact"),
    "jlama": ("Jlama Q4", _jlama, "int4-g32-exact"),
}
"""Key → label, writer, and the recipe that keeps the form's integers."""


def weight_bytes(place: Path) -> int:
    """Bytes of a form's weights."""
    return (place if place.is_file() else place / "model.safetensors").stat().st_size


def home(model: str) -> Path:
    """The folder where a model's forms are cached."""
    return ROOT / "build" / "detours" / model


GGUF = "model.gguf"


def write_meta(source: Checkpoint, folder: Path) -> None:
    """consolidated.00.pth and params.json, as `export_llm` reads them."""
    writers.write_meta(source, folder, exact_dtype(source))


def write_gguf(source: Checkpoint, folder: Path) -> None:
    """model.gguf, which llama.cpp quantizes; weights are equal to the checkpoint's, bit for bit."""
    kind = GGMLQuantizationType.BF16 if exact_dtype(source) is torch.bfloat16 else GGMLQuantizationType.F32
    writers.write_gguf(folder / GGUF, writers.gguf_metadata(source.architecture), writers.gguf_tensors(source, kind))


def exact_dtype(source: Checkpoint) -> torch.dtype:
    """bfloat16 if it holds every weight exactly, else float32; one tensor is in memory at a time."""
    tensors = (source.read(name) for name in source.architecture.tensor_shapes())
    return torch.bfloat16 if all(torch.equal(w.bfloat16().float(), w) for w in tensors) else torch.float32


_STOCK_FORMS: dict[str, Callable[[Checkpoint, Path], object]] = {
    "huggingface": write_hugging_face,
    "meta": write_meta,
    "gguf": write_gguf,
}


def main(form: str, out: str, artifact: str, source: str | None = None) -> None:
    """Write one form into an existing folder."""
    _STOCK_FORMS[form](checkpoint_of(manifest.read(Path(artifact)), source), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
