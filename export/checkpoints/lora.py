"""A LoRA adapter of PEFT (rsLoRA and DoRA too), merged into a base checkpoint: W + scaling · B·A, as peft merges it.

A setting that would change the result and is not computed here is refused by name. Fields as in peft
`tuners/lora/config.py`; patterns as in its `utils/other.py` (`get_pattern_key`).
"""

import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.architecture import EMBEDDING, HEAD, Architecture
from export.errors import ExportError, explain

from .files import GATHER, missing, require_inside
from .folder import copy_tokenizer
from .integers import Integers, Unfit
from .origin import (
    ADAPTER_CONFIG,
    NOT_AN_ADAPTER,
    Origin,
    adapted_tokenizer_files,
    is_named_base,
    is_of_tokenizer,
    name_of,
    published_base,
    tokenizer_files,
)
from .safetensors import SafetensorsFiles, read_json

if TYPE_CHECKING:
    from . import Source

_STEM = "adapter_model"
_PART = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|weight|base_layer\.weight)"
)
_REPLACING = ("weight", "base_layer.weight")
"""modules_to_save, and the copies of embedding and head that peft saves beside their matrices."""
_TABLES = ("model.embed_tokens", "lm_head")
"""Modules that are one table in a tied model."""
_BY_HAND = "merge with peft (`merge_and_unload`, `save_pretrained`) and give the result with --source"
_LARGEST_SCALING = torch.finfo(torch.float32).max
_Rank = Annotated[int, Field(gt=0, le=2**16)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]
_Value = TypeVar("_Value", int, float)
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
    "corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config",
    "ensure_weight_tying", "merge_weights",  # the tensors show it; of peft 0.2
    "fan_in_fan_out",  # of layers that Llama does not have; peft sets it to false for linears
}  # fmt: skip
"""Without effect on the merge: the tensors' names and shapes show which modules have which matrices. What an
initialization was told matters only with that `init_lora_weights`; those that change the base are refused by it."""
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Other initializations (PiSSA, OLoRA, LoftQ …) change the base weights too."""
_QUANTIFIER, _GROUP, _AFTER_GROUP = re.compile(r"[*+?{]"), re.compile(r"\("), re.compile(r"\)[*+?{]")
_MAX_QUANTIFIERS, _MAX_GROUPS, _MAX_PATTERN, _MAX_PATTERNS = 2, 2, 200, 4096
"""A pattern may be any regular expression that cannot backtrack without end; there may be one for each linear."""


class _LoraConfig(BaseModel):
    """The fields that decide the merged weights; all others stay in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool | None = False
    use_dora: bool | None = False
    bias: Literal["none"] = "none"
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    init_lora_weights: bool | str | None = True

    def rank(self, module: str) -> int:
        """Of `model.layers.0.self_attn.q_proj`."""
        return _of_pattern(self.rank_pattern or {}, module, self.r)

    def scaling(self, module: str) -> float:
        """Factor of B·A."""
        rank = self.rank(module)
        return _of_pattern(self.alpha_pattern or {}, module, self.lora_alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )


def _of_pattern(patterns: Mapping[str, _Value], module: str, default: _Value) -> _Value:
    """The value of the first pattern that the end of a module's name matches."""
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module):
            return value
    return default


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _read_config(path: Path) -> _LoraConfig:
    """Raises ExportError: not LoRA, or with something that is not merged here."""
    fields = read_json(path)
    if "lora_parameters" in fields and "peft_type" not in fields:
        raise ExportError(
            f"{path}: an adapter of mlx-lm, which is not merged here; fuse it with `mlx_lm.fuse` and give the result, "
            "in floats, with --source"
        )
    try:
        config = _LoraConfig.model_validate(fields)
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error)}; LoRA adapters without biases are merged") from None
    for key, value in (config.model_extra or {}).items():
        if key not in _WITHOUT_EFFECT and value:
            raise ExportError(f"{path}: {key:.60} is {value!r:.60}, which is not merged here; {_BY_HAND}")
    init = config.init_lora_weights
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        raise ExportError(
            f"{path}: init_lora_weights is {config.init_lora_weights!r:.60}: training has changed the base weights "
            f"too; {_BY_HAND}"
        )
    patterns = {**(config.rank_pattern or {}), **(config.alpha_pattern or {})}
    if len(patterns) > _MAX_PATTERNS:
        raise ExportError(f"{path}: {len(patterns)} patterns of ranks and alphas, at most {_MAX_PATTERNS} are read")
    for pattern in patterns:
        _require_harmless(pattern, path)
    return config


def _require_harmless(pattern: str, path: Path) -> None:
    """A regular expression that matches or fails in little time on every name."""
    harmless = (
        len(pattern) <= _MAX_PATTERN
        and len(_QUANTIFIER.findall(pattern)) <= _MAX_QUANTIFIERS
        and len(_GROUP.findall(pattern)) <= _MAX_GROUPS
    )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        harmless = False
    if not harmless or _AFTER_GROUP.search(pattern):
        raise ExportError(f"{path}: the pattern {pattern!r:.60} is no plain name of modules; {_BY_HAND}")


@dataclass(frozen=True)
class _Change:
    """What the adapter does to one weight; tensor names are the adapter's."""

    parts: Mapping[str, str]
    """Kind of part (`lora_A.weight`) → tensor name."""
    scaling: float

    @property
    def matrices(self) -> tuple[str, str] | None:
        """The two names in the order whose product is [out, in] or, of an embedding, [vocabulary, hidden]."""
        for first, second in (("lora_B.weight", "lora_A.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if first in self.parts:
                return self.parts[first], self.parts[second]
        return None

    @property
    def replaced(self) -> str | None:
        """Name of the tensor that takes the place of the base's weight."""
        return next((self.parts[part] for part in _REPLACING if part in self.parts), None)


class LoraSource:
    """A base checkpoint as the adapter changes it; one tensor is merged at a time, in place."""

    def __init__(self, base: "Source", folder: Path, origin: Origin) -> None:
        self._base, self._folder = base, folder
        if not (folder / ADAPTER_CONFIG).is_file():
            raise missing(folder / ADAPTER_CONFIG, NOT_AN_ADAPTER)
        self._config = _read_config(folder / ADAPTER_CONFIG)
        self._stored = SafetensorsFiles(folder, _STEM)
        self._changes = _changes_of(self._stored, self._config, base)
        weights = [path for path in base.files if not is_of_tokenizer(name_of(path))]
        tokenizer = adapted_tokenizer_files(folder, (path for path in base.files if is_of_tokenizer(name_of(path))))
        self.files = (*weights, folder / ADAPTER_CONFIG, *self._stored.files, *tokenizer)
        require_inside([path for path in self.files if path not in base.files], folder)
        self.notes = (*base.notes, *_other_base(folder, origin, base), *self._stored.notes, *_unread(folder))

    @property
    def description(self) -> str:
        linears = self.architecture.linear_shapes()
        count = sum(name in linears for name in self._changes)
        others = len(self._changes) - count
        kind = "DoRA" if self._config.use_dora else "rsLoRA" if self._config.use_rslora else "LoRA"
        merged = f"{count} of {len(linears)} linears" + (f" and {others} other weights" if others else "")
        return f"{self._base.description}; {kind} for {published_base(self._folder)} merged into {merged}"

    @property
    def architecture(self) -> Architecture:
        return self._base.architecture

    @property
    def stated_ids(self) -> Mapping[str, Mapping[str, Any]]:
        return self._base.stated_ids

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._base.shapes

    def read(self, name: str) -> torch.Tensor:
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name)
        weight = self._stored.read(change.replaced) if change.replaced else self._base.read(name)
        if change.matrices is None:
            return weight
        left, right = (self._stored.read(part) for part in change.matrices)
        if "lora_embedding_A" in change.parts:
            left, right = left.T, right.T
        weight.addmm_(left, right, alpha=change.scaling)
        # DoRA: each row of the sum gives the direction, the trained magnitude its length
        if magnitude := change.parts.get("lora_magnitude_vector"):
            weight.mul_((self._stored.read(magnitude) / torch.linalg.norm(weight, dim=1))[:, None])
        return weight

    def integers(self, name: str) -> Integers | Unfit | None:
        integers = self._base.integers(name)
        return Unfit("an adapter that changes them") if integers and name in self._changes else integers

    def write_tokenizer(self, folder: Path) -> None:
        """The one saved with the adapter, where there is one: fine-tuning may have changed the chat template."""
        if not (self._folder / "tokenizer.json").is_file():
            self._base.write_tokenizer(folder)
            return
        copy_tokenizer(self._folder, folder)
        if (folder / "generation_config.json").is_file():
            return
        with tempfile.TemporaryDirectory() as temporary:
            self._base.write_tokenizer(Path(temporary))
            defaults = Path(temporary) / "generation_config.json"
            if defaults.is_file():
                (folder / defaults.name).write_bytes(defaults.read_bytes())


def _other_base(folder: Path, origin: Origin, base: "Source") -> tuple[str, ...]:
    """What an adapter was trained on, where it is merged into something else."""
    if is_named_base(folder, origin):
        return ()
    return (f"the adapter was trained on {published_base(folder)} and is merged into {origin} ({base.description})",)


def _unread(folder: Path) -> tuple[str, ...]:
    """The tokenizer's files beside an adapter that brings no tokenizer, as neither transformers nor peft read them."""
    names = [path.name for path in tokenizer_files(folder)]
    if not names or "tokenizer.json" in names:
        return ()
    return (f"the adapter's {', '.join(names)} without a tokenizer.json is not read; the base's tokenizer is",)


def _changes_of(stored: SafetensorsFiles, config: _LoraConfig, base: "Source") -> dict[str, _Change]:
    """Weight → change; every part has the shape that the base needs.

    Raises ExportError: a tensor of no weight of this base, or one that does not fit it.
    """
    a = base.architecture
    shapes = a.tensor_shapes() | {HEAD: (a.vocab_size, a.hidden_size)}
    parts: dict[str, dict[str, str]] = {}
    for name, shape in stored.shapes.items():
        match = _PART.fullmatch(name)
        if match is None or f"{match['module']}.weight" not in shapes:
            raise ExportError(
                f"{stored.file_of(name)}: tensor {name:.120} changes nothing that this base has; {_BY_HAND}"
            )
        if not prod(shape):
            raise ExportError(f"{stored.file_of(name)}: tensor {name} has shape {list(shape)}; {GATHER}")
        parts.setdefault(match["module"], {})[match["part"]] = name
    if not parts:
        raise ExportError(f"{stored.folder}: the adapter holds no tensors; save it again with `save_pretrained`")
    for names in (parts[module] for module in _TABLES if module in parts):
        _refuse_other_vocabulary(stored, names, a.vocab_size)
    if a.tie_word_embeddings:
        parts = _of_one_table(stored, parts, base)
    for module, names in parts.items():
        _require_parts(stored, module, names, config, shapes[f"{module}.weight"])
    changes = {f"{module}.weight": _Change(names, config.scaling(module)) for module, names in parts.items()}
    for name, change in changes.items():
        if abs(change.scaling) > _LARGEST_SCALING:
            raise ExportError(f"{stored.folder}: {name}: the adapter is scaled by {change.scaling:.3g}; save it again")
    return changes


def _refuse_other_vocabulary(stored: SafetensorsFiles, names: Mapping[str, str], vocabulary: int) -> None:
    """Parts of embedding or head with other rows than the base."""
    for part, axis in (("weight", 0), ("base_layer.weight", 0), ("lora_B.weight", 0), ("lora_embedding_A", 1)):
        shape = stored.shapes[names[part]] if part in names else ()
        if axis < len(shape) and shape[axis] != vocabulary:
            raise ExportError(
                f"{stored.file_of(names[part])}: tensor {names[part]} is for {shape[axis]} tokens, this base has "
                f"{vocabulary}; if training resized the vocabulary, call `resize_token_embeddings({shape[axis]})` on "
                f"the base, then {_BY_HAND}"
            )


def _of_one_table(
    stored: SafetensorsFiles, parts: dict[str, dict[str, str]], base: "Source"
) -> dict[str, dict[str, str]]:
    """The parts without a tied head's: copies of the base's table change nothing, two equal ones are its new one.

    Raises ExportError: embedding and head change apart, which a tied model cannot.
    """
    rest = {module: names for module, names in parts.items() if module not in _TABLES}
    tables = {module: parts[module] for module in _TABLES if module in parts}
    copies = [stored.tensor(part) for names in tables.values() for kind, part in names.items() if kind in _REPLACING]
    if len(copies) == sum(map(len, tables.values())):
        kept = base.read(EMBEDDING) if copies else None
        if all(kept is not None and copy.equal(kept.to(copy.dtype)) for copy in copies):
            return rest
        if len(tables) == len(_TABLES) and all(copy.equal(copies[0]) for copy in copies):
            return rest | {_TABLES[0]: tables[_TABLES[0]]}
    raise ExportError(
        f"{stored.folder}: the adapter changes {' and '.join(tables)}, but embedding and head are one table in this "
        "base; save the base with a head of its own (docs/checkpoints.md, LoRA adapters) and give that with --source"
    )


def _require_parts(
    stored: SafetensorsFiles, module: str, names: Mapping[str, str], config: _LoraConfig, shape: tuple[int, ...]
) -> None:
    """A and B of the configured rank, everything else of the base's shape."""
    rank = config.rank(module)
    expected: dict[str, tuple[int, ...]] = {"weight": shape, "base_layer.weight": shape}
    if len(shape) == 2 and module == "model.embed_tokens":
        expected |= {"lora_embedding_A": (rank, shape[0]), "lora_embedding_B": (shape[1], rank)}
    elif len(shape) == 2:
        expected |= {"lora_A.weight": (rank, shape[1]), "lora_B.weight": (shape[0], rank)}
        expected |= {"lora_magnitude_vector": (shape[0],)} if config.use_dora else {}
    for part, name in names.items():
        if part not in expected:
            raise ExportError(f"{stored.file_of(name)}: tensor {name} is not merged into {module}; {_BY_HAND}")
        if stored.shapes[name] != expected[part]:
            raise ExportError(
                f"{stored.file_of(name)}: tensor {name} has shape {list(stored.shapes[name])}, this base and rank "
                f"{rank} need {list(expected[part])}"
            )
    matrices = [part for part in expected if part.startswith("lora_")]
    missing = [part for part in matrices if part not in names]
    if missing and len(missing) < len(matrices):
        raise ExportError(f"{stored.folder}: the adapter has no {missing[0]} for {module}; save it again")
    if missing and not any(part in names for part in _REPLACING):
        raise ExportError(f"{stored.folder}: the adapter has nothing to merge into {module}; save it again")
