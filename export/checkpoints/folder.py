"""A Hugging Face folder: config.json, weights in safetensors (floats or quantized), tokenizer files."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from export.architecture import Architecture, RopeScaling
from export.errors import ExportError, explain
from export.host.digests import remembered_sha256

from . import names
from .files import missing, require_inside
from .integers import Integers, Unfit
from .origin import TOKENIZER_PATTERNS, Hub, name_of, tokenizer_files
from .safetensors import SafetensorsFiles, read_json

if TYPE_CHECKING:
    from . import Weights

_QUANTIZE_CONFIG = "quantize_config.json"
"""Where AutoGPTQ wrote what config.json holds today."""
_PART_OF_INTEGERS = re.compile(r"_proj\.(?!weight$|bias$)")
_CHUNK_BYTES = 2**20
_ORIGINAL_LENGTH = "original_max_position_embeddings"
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
            raise missing(config_path, "; --source must be a Hugging Face model folder")
        config = read_json(config_path)
        self.architecture = _architecture_of(config, config_path)
        weights, notes = _open_weights(folder, config, config_path)
        self._weights = names.renamed(weights, folder, tied=self.architecture.tie_word_embeddings)
        self.stated_ids = {str(config_path): config}
        self.files = (config_path, *self._weights.files, *tokenizer_files(folder))
        require_inside(self.files, folder)
        self.notes = (*_said_twice(config), *notes, *self._weights.notes, *_other_models(folder))
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


def _other_models(folder: Path) -> tuple[str, ...]:
    """What else this folder could be taken for."""
    others = {
        "params.json": "not",
        "adapter_config.json": "only with --adapter",
        "chat_template.json": "not: save its template as chat_template.jinja if it is the model's",
    }
    return tuple(
        f"config.json is read, {name} beside it {how}" for name, how in others.items() if (folder / name).is_file()
    )


def _open_unsaid(folder: Path, path: Path) -> "Weights":
    """Where no settings say that the weights are quantized: floats, or bitsandbytes', whose tensors say it."""
    from .quantized import bitsandbytes

    stored = SafetensorsFiles(folder)
    if any(bitsandbytes.STATE in name for name in stored.shapes):
        return bitsandbytes.open_weights(stored, {}, path)
    if not stored.all_floats and (part := next(filter(_PART_OF_INTEGERS.search, stored.shapes), None)):
        raise ExportError(
            f"{path}: says nothing of quantization, but {part} is a part of quantized weights; take the config.json "
            "that came with them, or give a float checkpoint"
        )
    return stored


def _open_weights(folder: Path, config: dict[str, Any], path: Path) -> "tuple[Weights, tuple[str, ...]]":
    """By what `config` (at `path`) and the tensors say of the form, and a note where the two disagree.

    Where all tensors are floats there is nothing to dequantize, whatever the settings of a base have left behind.
    """
    from .quantized import bitsandbytes, gptq, jlama, torchao

    quantization = config.get("quantization_config")
    if quantization is None and (folder / _QUANTIZE_CONFIG).is_file():
        path = folder / _QUANTIZE_CONFIG
        quantization = {"quant_method": "gptq", **read_json(path)}
    if jlama.is_jlama(folder):
        if quantization is not None:
            raise ExportError(f"{path}: says that the weights are quantized, but the tensors are Jlama's; remove that")
        return jlama.open_weights(folder), ()
    if isinstance(config.get("quantization"), dict):
        quantization = {"quant_method": "mlx"}
    if quantization is None:
        return _open_unsaid(folder, path), ()
    if not isinstance(quantization, dict):
        raise ExportError(f"{path}: quantization_config is {quantization!r:.60}, expected an object")
    method = quantization.get("quant_method")
    stored = SafetensorsFiles(folder)
    if stored.all_floats:
        said = f"{path.name} says that the weights are quantized (quant_method {method!r:.60})"
        return stored, (f"{said}, but all of them are floats and are read as such",)
    _refuse_other_quantization(quantization, path)
    match method:
        case "gptq":
            return gptq.open_weights(stored, quantization, path), ()
        case "torchao":
            return torchao.open_weights(stored, path), ()
        case _:
            return bitsandbytes.open_weights(stored, quantization, path), ()


def _refuse_other_quantization(quantization: dict[str, Any], path: Path) -> None:
    """Of the quantized checkpoints in this form, those of bitsandbytes 4-bit, GPTQ and torchao are read."""
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
    rope = _rope_of(config, path)
    try:
        heads, kv_heads, size = config["num_attention_heads"], config.get("num_key_value_heads"), config.get("head_dim")
        fields = {
            **{key: config[key] for key in Architecture.model_fields if key in config},
            "num_key_value_heads": heads if kv_heads is None else kv_heads,
            "head_dim": config["hidden_size"] // heads if size is None else size,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": _scaling_of(rope, path),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
        }
        _require_numbers(fields, path)
        return Architecture.model_validate(fields)
    except KeyError as error:
        raise ExportError(f"{path}: key {error} is missing") from None
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error)}") from None
    except (TypeError, ZeroDivisionError) as error:  # of the division
        raise ExportError(f"{path}: hidden_size or num_attention_heads is no usable number ({error})") from None


def _rope_of(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """RoPE settings as transformers joins them (`modeling_rope_utils.py`, `convert_rope_params_to_dict`).

    `rope_scaling` stands for all of `rope_parameters`; in either a value goes before the one at the top, but for the
    original length.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ExportError(f"{path}: the RoPE settings are {rope!r:.200}, expected one object of numbers")
    top = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    original = config.get(_ORIGINAL_LENGTH, rope.get(_ORIGINAL_LENGTH, config.get("max_position_embeddings")))
    kind = {"rope_type": rope.get("type", "default")}
    return {"rope_theta": 10000.0, **kind, **top, **rope, _ORIGINAL_LENGTH: original}


def _scaling_of(rope: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Fields of a RopeScaling; None: frequencies are as they are, also where a factor of 1 divides them."""
    kind = rope["rope_type"]
    if kind == "default" or (kind in ("linear", "dynamic") and rope.get("factor") == 1):
        return None
    if kind != "llama3":
        raise ExportError(f"{path}: rope type {kind!r:.60} is not supported; only 'default' and 'llama3'")
    if rope.get("partial_rotary_factor", 1.0) != 1:
        raise ExportError(
            f"{path}: partial_rotary_factor is {rope['partial_rotary_factor']!r:.60}; only 1 is supported"
        )
    return {key: rope[key] for key in RopeScaling.model_fields}


def _require_numbers(fields: dict[str, Any], path: Path) -> None:
    """A text or a truth value is no number, as in transformers; pydantic would convert it."""
    for key, value in (fields | (fields["rope_scaling"] or {})).items():
        truth = key in ("tie_word_embeddings", "rotated")
        if isinstance(value, str) or isinstance(value, bool) != truth:
            expected = "true or false" if truth else "a number"
            raise ExportError(f"{path}: {key} is {json.dumps(value):.60}, expected {expected}")


def _said_twice(config: dict[str, Any]) -> tuple[str, ...]:
    """RoPE settings that stand at two places with different values, a line each; the first is transformers' choice."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    notes = []
    if scaling and parameters and scaling != parameters:
        notes.append("config.json: rope_scaling and rope_parameters differ; rope_scaling is read, as transformers does")
    name = "rope_scaling" if scaling else "rope_parameters"
    theta, top = (scaling or parameters or {}).get("rope_theta"), config.get("rope_theta")
    if None not in (theta, top) and theta != top:
        notes.append(
            f"config.json: rope_theta is {top} at the top and {theta} in {name}, which is read, as transformers does"
        )
    return tuple(notes)


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
