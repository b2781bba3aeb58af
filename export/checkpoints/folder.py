"""A Hugging Face folder: config.json, weights in safetensors (floats or quantized), tokenizer files."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from export.architecture import Architecture, RopeScaling
from export.errors import ExportError
from export.host.digests import remembered_sha256
from export.plan import explain

from .integers import Integers, Unfit
from .origin import TOKENIZER_PATTERNS, Hub, name_of, tokenizer_files
from .safetensors import SafetensorsFiles, read_json

if TYPE_CHECKING:
    from . import Weights

_QUANTIZE_CONFIG = "quantize_config.json"
"""Where AutoGPTQ wrote what config.json holds today."""
_CHUNK_BYTES = 2**20
_NO_ANSWER = (ValueError, TypeError, LookupError, AttributeError)
"""What the library raises where a hub does not answer as its protocol says."""
_DOWNLOADED = ("config.json", _QUANTIZE_CONFIG, "*.safetensors", "*.safetensors.index.json", *TOKENIZER_PATTERNS)


def download(origin: Hub) -> Path:
    """The local snapshot folder, through huggingface_hub's cache; safetensors only.

    Raises ExportError: not there, not reachable, or damaged on the way.
    """
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name = origin.repo
    remedy = "give a local folder with --source"
    try:
        folder = Path(snapshot_download(name, revision=origin.revision, allow_patterns=list(_DOWNLOADED)))
    except GatedRepoError:
        raise ExportError(f"hub model {name} is gated: accept its licence and `hf auth login`, or {remedy}") from None
    except RepositoryNotFoundError:
        raise ExportError(f"hub model {name} does not exist (or needs `hf auth login`); {remedy}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError, *_NO_ANSWER) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"hub model {name} cannot be downloaded ({reason}); {remedy}") from None
    _require_whole(folder)
    return folder


class FolderSource:
    """`config.json`, weights, tokenizer files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise ExportError(f"{config_path}: missing; --source must be a Hugging Face model folder")
        config = read_json(config_path)
        self.architecture = _architecture_of(config, config_path)
        self._weights = _open_weights(folder, config, config_path)
        self.stated_ids = {str(config_path): config}
        self.files = (config_path, *self._weights.files, *tokenizer_files(folder))
        self.description = f"Hugging Face folder, {self._weights.description}"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._weights.shapes

    def read(self, name: str) -> torch.Tensor:
        return self._weights.read(name)

    def integers(self, name: str) -> Integers | Unfit | None:
        return self._weights.integers(name)

    def write_tokenizer(self, folder: Path) -> None:
        if not (self.folder / "tokenizer.json").is_file():
            raise ExportError(
                f"{self.folder / 'tokenizer.json'}: missing; save the tokenizer with `save_pretrained` into the folder"
            )
        copy_tokenizer(self.folder, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy those of the tokenizer's files that are there."""
    for path in tokenizer_files(source):
        copy = folder / name_of(path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o644)


def _open_weights(folder: Path, config: dict[str, Any], path: Path) -> "Weights":
    """By what `config` (at `path`) and the tensors' names say of the form."""
    from . import bitsandbytes, gptq, jlama, torchao

    quantization = config.get("quantization_config")
    if quantization is None and (folder / _QUANTIZE_CONFIG).is_file():
        path = folder / _QUANTIZE_CONFIG
        quantization = {"quant_method": "gptq", **read_json(path)}
    if quantization is None:
        if jlama.is_jlama(folder):
            return jlama.open_weights(folder)
        stored = SafetensorsFiles(folder)
        quantized = any(bitsandbytes.STATE in name for name in stored.shapes)
        return bitsandbytes.open_weights(stored, {}, path) if quantized else stored
    _refuse_other_quantization(quantization, path)
    stored = SafetensorsFiles(folder)
    match quantization["quant_method"]:
        case "gptq":
            return gptq.open_weights(stored, quantization, path)
        case "torchao":
            return torchao.open_weights(stored, path)
        case _:
            return bitsandbytes.open_weights(stored, quantization, path)


def _refuse_other_quantization(quantization: Any, path: Path) -> None:
    """Of the quantized checkpoints in this form, those of bitsandbytes 4-bit, GPTQ and torchao are read."""
    if not isinstance(quantization, dict):
        raise ExportError(f"{path}: quantization_config is {quantization!r:.60}, expected an object")
    method = quantization.get("quant_method")
    if method not in ("bitsandbytes", "gptq", "torchao"):
        raise ExportError(
            f"{path}: the checkpoint is already quantized (quant_method {method!r:.60}); only bitsandbytes 4-bit, "
            "gptq and torchao are read; give a float checkpoint"
        )
    if method == "bitsandbytes" and not quantization.get("load_in_4bit"):
        raise ExportError(f"{path}: bitsandbytes without load_in_4bit (LLM.int8) is not read; give a float checkpoint")


def _architecture_of(config: dict[str, Any], path: Path) -> Architecture:
    """config.json of transformers (4 or 5) → Architecture; refuses what our model does not compute."""
    if config.get("model_type") != "llama":
        raise ExportError(f"{path}: model_type is {config.get('model_type')!r}; only 'llama' is supported")
    for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, only) != only:
            raise ExportError(f"{path}: {key} is {config[key]!r}; only {only!r} is supported")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ExportError(f"{path}: the RoPE settings are {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ExportError(f"{path}: rope type {kind!r} is not supported; only 'default' and 'llama3'")
    try:
        heads = config["num_attention_heads"]
        return Architecture.model_validate(
            {
                **{key: config[key] for key in Architecture.model_fields if key in config},
                "num_key_value_heads": config.get("num_key_value_heads") or heads,
                "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
                "rope_theta": config.get("rope_theta", rope.get("rope_theta", 10000.0)),
                "rope_scaling": {key: rope[key] for key in RopeScaling.model_fields} if kind == "llama3" else None,
                "tie_word_embeddings": config.get("tie_word_embeddings", False),
            }
        )
    except KeyError as error:
        raise ExportError(f"{path}: key {error} is missing") from None
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error)}") from None
    except (TypeError, ZeroDivisionError) as error:  # of the division
        raise ExportError(f"{path}: hidden_size or num_attention_heads is no usable number ({error})") from None


def _require_whole(snapshot: Path) -> None:
    """Every file has the bytes of its digest. Raises ExportError: damaged on the way or on the disk.

    Where a mirror's names are not digests, nothing can be checked, and the files are taken as they are.
    """
    for path in sorted(snapshot.rglob("*")):
        digest = path.resolve().name
        if path.is_file() and _digest_of(path, digest) != digest:
            raise ExportError(
                f"{path}: not the bytes that the hub promised ({digest[:12]}…); remove {path.resolve()} and run again"
            )


def _digest_of(path: Path, promised: str) -> str:
    """The digest of the same kind as the promised one; where that is of an unknown kind, the promised one."""
    if not set(promised) <= set("0123456789abcdef") or len(promised) not in (40, 64):
        return promised
    if len(promised) == 64:
        return remembered_sha256(path)
    with path.open("rb") as file:
        blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while chunk := file.read(_CHUNK_BYTES):
            blob.update(chunk)
        return blob.hexdigest()


def config_json(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the keys that transformers 4 and 5 and the onnxruntime-genai builder all read."""
    scaling = architecture.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **architecture.model_dump(exclude={"rope_scaling"}),
        "rope_scaling": {"rope_type": "llama3", **scaling.model_dump()} if scaling else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
