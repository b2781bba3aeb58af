"""adapter_config.json of PEFT: what of it decides the merged weights. Anything else that would, is refused by name.

Fields as in peft `tuners/lora/config.py`; patterns as in its `utils/other.py` (`get_pattern_key`).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ExportError
from ..plan import explain
from .safetensors_files import read_json

Rank = Annotated[int, Field(gt=0, le=2**16)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]
Value = TypeVar("Value", int, float)
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
    "fan_in_fan_out",  # of layers that Llama does not have; peft sets it to false for linears
}  # fmt: skip
"""On the merge: the tensors' names and shapes say which modules have which matrices."""
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Other ways to begin (PiSSA, OLoRA, LoftQ …) change the base weights too."""
QUANTIFIER, AFTER_GROUP = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]")
MAX_QUANTIFIERS, MAX_PATTERN = 2, 200
"""A pattern may be any regular expression, but not one that takes forever."""


class LoraConfig(BaseModel):
    """The fields that decide; all others stay in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: Alpha
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none"] = "none"
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    init_lora_weights: bool | str | None = True

    def rank(self, module: str) -> int:
        """Of `model.layers.0.self_attn.q_proj`."""
        return of_pattern(self.rank_pattern or {}, module, self.r)

    def scaling(self, module: str) -> float:
        """Factor of B·A."""
        rank = self.rank(module)
        return of_pattern(self.alpha_pattern or {}, module, self.lora_alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )


def of_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first pattern that the end of a module's name matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_config(path: Path) -> LoraConfig:
    """Raises ExportError: not LoRA, or with something that our merge does not do."""
    fields = read_json(path)
    try:
        config = LoraConfig.model_validate(fields)
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error)}; LoRA adapters without biases are merged") from None
    for key, value in (config.model_extra or {}).items():
        if key not in WITHOUT_EFFECT and value:
            raise ExportError(f"{path}: {key:.60} is {value!r:.60}, which is not merged here; {by_hand()}")
    if config.init_lora_weights not in PLAIN_INITS:
        raise ExportError(
            f"{path}: init_lora_weights is {config.init_lora_weights!r:.60}: training has changed the base weights "
            f"too; {by_hand()}"
        )
    for pattern in {**(config.rank_pattern or {}), **(config.alpha_pattern or {})}:
        require_harmless(pattern, path)
    return config


def require_harmless(pattern: str, path: Path) -> None:
    """A regular expression that ends soon on every name."""
    harmless = len(pattern) <= MAX_PATTERN and len(QUANTIFIER.findall(pattern)) <= MAX_QUANTIFIERS
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        harmless = False
    if not harmless or AFTER_GROUP.search(pattern):
        raise ExportError(f"{path}: the pattern {pattern!r:.60} is no plain name of modules; {by_hand()}")


def by_hand() -> str:
    """What to do instead."""
    return "merge with peft (`merge_and_unload`, `save_pretrained`) and give the result with --source"


def base_name(config: LoraConfig) -> str:
    """What the adapter was trained on, for people."""
    found: Any = (config.model_extra or {}).get("base_model_name_or_path")
    return found if isinstance(found, str) and found else "a model it does not name"
