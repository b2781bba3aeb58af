"""A Hugging Face folder: config.json, weights in safetensors (floats or quantized), tokenizer files."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from ..errors import ExportError
from ..plan import Architecture, RopeScaling, explain
from . import hub_cache
from .integers import Integers, Unfit
from .safetensors_files import SafetensorsFiles, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
QUANTIZE_CONFIG = "quantize_config.json"
"""Where AutoGPTQ kept what config.json says now."""
NO_ANSWER = (ValueError, TypeError, LookupError, AttributeError)
"""What the library raises where a hub answers something else than its protocol."""
WANTED = ("config.json", QUANTIZE_CONFIG, "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)


def download(repo: str) -> Path:
    """`OWNER/NAME[@REVISION]` → local snapshot folder, through huggingface_hub's cache; safetensors only."""
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = repo.partition("@")
    remedy = "give a local folder with --source"
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED)))
    except GatedRepoError:
        raise ExportError(f"hub model {name} is gated: accept its licence and `hf auth login`, or {remedy}") from None
    except RepositoryNotFoundError:
        raise ExportError(f"hub model {name} does not exist (or needs `hf auth login`); {remedy}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError, *NO_ANSWER) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"hub model {name} cannot be downloaded ({reason}); {remedy}") from None
    hub_cache.require_whole(folder)
    return folder


class Weights(Protocol):
    """What a folder's weight files hold, however they hold it; see `Source`."""

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def description(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> torch.Tensor: ...

    def integers(self, name: str) -> Integers | Unfit | None: ...


class FolderSource:
    """`config.json`, weights, tokenizer files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise ExportError(f"{config_path}: missing; --source must be a Hugging Face model folder")
        config = read_json(config_path)
        self.architecture = architecture_of(config, config_path)
        self._weights = open_weights(folder, config, config_path)
        self.files = (config_path, *self._weights.files)
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
    """Those of the tokenizer's files that are there."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            (folder / name).chmod(0o644)


def open_weights(folder: Path, config: dict[str, Any], path: Path) -> Weights:
    """Floats, bitsandbytes 4-bit, Jlama's, GPTQ or torchao, as `config` (at `path`) and the tensors' names say."""
    from . import bnb_4bit, gptq, jlama, torchao_tensors

    quantization = config.get("quantization_config")
    if quantization is None and (folder / QUANTIZE_CONFIG).is_file():
        path = folder / QUANTIZE_CONFIG
        quantization = {"quant_method": "gptq", **read_json(path)}
    if quantization is not None:
        refuse_other_quantization(quantization, path)
    if quantization is None and jlama.is_jlama(folder):
        return jlama.open_weights(folder)
    stored = SafetensorsFiles(folder)
    if quantization is not None and quantization["quant_method"] == "gptq":
        return gptq.open_weights(stored, quantization, path)
    if quantization is not None and quantization["quant_method"] == "torchao":
        return torchao_tensors.open_weights(stored, path)
    if quantization is None and not any(bnb_4bit.STATE in name for name in stored.shapes):
        return stored
    return bnb_4bit.open_weights(stored, quantization or {}, path)


def refuse_other_quantization(quantization: Any, path: Path) -> None:
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


def architecture_of(config: dict[str, Any], path: Path) -> Architecture:
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
