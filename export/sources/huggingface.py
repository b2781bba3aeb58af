"""A Hugging Face folder: config.json and safetensors, one file or sharded, memory-mapped. Never unpickles."""

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from ..errors import ExportError
from ..plan import Architecture, RopeScaling, explain

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
PICKLES = (".bin", ".pth", ".pt")
WANTED = ("config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)
FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}


def download(repo: str) -> Path:
    """`OWNER/NAME[@REVISION]` → local snapshot folder, through huggingface_hub's cache; safetensors only."""
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = repo.partition("@")
    remedy = "give a local folder with --source"
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED)))
    except GatedRepoError:
        raise ExportError(f"hub model {name} is gated: accept its licence and `hf auth login`, or {remedy}") from None
    except RepositoryNotFoundError:
        raise ExportError(f"hub model {name} does not exist (or needs `hf auth login`); {remedy}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"hub model {name} cannot be downloaded ({reason}); {remedy}") from None


class FolderSource:
    """`config.json`, `model.safetensors` or its shards, tokenizer files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise ExportError(f"{config_path}: missing; --source must be a Hugging Face model folder")
        self.config = read_json(config_path)
        self.architecture = architecture_of(self.config, config_path)
        self._owner = self._index()
        self.files = (config_path, *sorted(set(self._owner.values())))
        self.description = f"Hugging Face folder, safetensors, {len(self._owner)} tensors"

    def _index(self) -> dict[str, Path]:
        """Tensor name → file. Paths that leave the folder are refused."""
        index_path = self.folder / "model.safetensors.index.json"
        if not index_path.is_file():
            single = self.folder / "model.safetensors"
            if not single.is_file():
                pickles = any(path.suffix in PICKLES for path in self.folder.iterdir())
                hint = "pickled weights are never loaded; " if pickles else ""
                raise ExportError(f"{single}: missing; {hint}save the model as safetensors")
            return dict.fromkeys(self._open(single).keys(), single)
        owner = self._weight_map(index_path)
        paths = sorted(set(owner.values()))
        for path in paths:
            if not path.is_file():
                raise ExportError(f"{path}: missing, but {index_path.name} names it; download the shard again")
        for path in paths:
            present = set(self._open(path).keys())
            listed = {name for name, file in owner.items() if file == path}
            if present != listed:
                names = ", ".join(sorted(present ^ listed)[:3])
                raise ExportError(f"{path}: its tensors differ from {index_path.name}: {names}; download it again")
        return owner

    def _weight_map(self, index_path: Path) -> dict[str, Path]:
        """Tensor name → file, as the index says."""
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ExportError(f"{index_path}: no `weight_map`; the index is damaged, download it again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ExportError(f"{index_path}: {name} points at {file!r}, not at a .safetensors file beside it")
        return {name: self.folder / file for name, file in weight_map.items()}

    def _open(self, path: Path) -> Any:
        """Mapped anew each time: what was read stays in memory as long as its mapping lives."""
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path}: damaged safetensors ({error}); download or save it again") from None

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        files = {path: self._open(path) for path in set(self._owner.values())}
        return {name: tuple(files[path].get_slice(name).get_shape()) for name, path in self._owner.items()}

    def _tensor(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._open(self._owner[name]).get_tensor(name)
        except (SafetensorError, AttributeError, TypeError, RuntimeError) as error:  # a dtype torch does not have
            raise ExportError(f"{self._owner[name]}: tensor {name} cannot be read ({error})") from None
        return tensor

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensor(name)
        if tensor.dtype not in FLOATS:
            raise ExportError(f"{self._owner[name]}: tensor {name} is {tensor.dtype}; only float weights are read here")
        values: torch.Tensor = tensor.to(torch.float32, copy=True)
        return values

    def write_tokenizer(self, folder: Path) -> None:
        if not (self.folder / "tokenizer.json").is_file():
            raise ExportError(
                f"{self.folder / 'tokenizer.json'}: missing; save the tokenizer with `save_pretrained` into the folder"
            )
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
                (folder / name).chmod(0o644)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def architecture_of(config: dict[str, Any], path: Path) -> Architecture:
    """config.json of transformers (4 or 5) → Architecture; refuses what our model does not compute."""
    if config.get("model_type") != "llama":
        raise ExportError(f"{path}: model_type is {config.get('model_type')!r}; only 'llama' is supported")
    for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, only) != only:
            raise ExportError(f"{path}: {key} is {config[key]!r}; only {only!r} is supported")
    if "quantization_config" in config:
        raise ExportError(f"{path}: the checkpoint is already quantized (quantization_config); give a float checkpoint")
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
