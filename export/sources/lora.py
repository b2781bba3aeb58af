"""A checkpoint with a LoRA adapter of PEFT (Unsloth's too) merged into it: W + scaling·B·A, in float32.

Tensor names and arithmetic as in peft `tuners/lora/layer.py` and `dora.py`; checked against peft itself. The adapter's
own header says which modules it changes.
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ExportError
from ..plan import Architecture
from .huggingface import copy_tokenizer
from .integers import Integers, Unfit
from .lora_config import LoraConfig, base_name, by_hand, read_config
from .safetensors_files import SafetensorsFiles

if TYPE_CHECKING:
    from . import Source

CONFIG, STEM = "adapter_config.json", "adapter_model"
PART = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|weight|base_layer\.weight)"
)
REPLACING = ("weight", "base_layer.weight")
"""modules_to_save, and the copies of embedding and head that peft saves beside their matrices."""
TIED = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Change:
    """What the adapter does to one weight; the names are the adapter's."""

    parts: Mapping[str, str]
    """Kind of part (`lora_A.weight`) → tensor name."""
    scaling: float

    @property
    def matrices(self) -> tuple[str, str] | None:
        """Names of A and B, in the order that gives [out, in] or, of an embedding, [vocabulary, hidden]."""
        for first, second in (("lora_B.weight", "lora_A.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if first in self.parts:
                return self.parts[first], self.parts[second]
        return None

    @property
    def replaced(self) -> str | None:
        """Name of the tensor that stands for the base's."""
        return next((self.parts[part] for part in REPLACING if part in self.parts), None)


class LoraSource:
    """A base checkpoint as the adapter changes it; one tensor is merged at a time, in place."""

    def __init__(self, base: "Source", folder: Path) -> None:
        self._base, self._folder = base, folder
        if not (folder / CONFIG).is_file():
            raise ExportError(
                f"{folder / CONFIG}: missing; --adapter must be a folder that peft's save_pretrained wrote"
            )
        self._config = read_config(folder / CONFIG)
        self._stored = SafetensorsFiles(folder, STEM)
        self._changes = changes_of(self._stored, self._config, base)
        self.files = (*base.files, folder / CONFIG, *self._stored.files)

    @property
    def description(self) -> str:
        linears = self.architecture.linear_shapes()
        count = sum(name in linears for name in self._changes)
        others = len(self._changes) - count
        kind = "DoRA" if self._config.use_dora else "rsLoRA" if self._config.use_rslora else "LoRA"
        merged = f"{count} of {len(linears)} linears" + (f" and {others} other weights" if others else "")
        return f"{self._base.description}; {kind} for {base_name(self._config):.80} merged into {merged}"

    @property
    def architecture(self) -> Architecture:
        return self._base.architecture

    @cached_property
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
        if magnitude := change.parts.get("lora_magnitude_vector"):
            weight.mul_((self._stored.read(magnitude) / torch.linalg.norm(weight, dim=1))[:, None])
        return weight

    def integers(self, name: str) -> Integers | Unfit | None:
        """As in `Source`: the base's, of weights that the adapter leaves as they are."""
        found = self._base.integers(name)
        return Unfit("an adapter that changes them") if found and name in self._changes else found

    def write_tokenizer(self, folder: Path) -> None:
        """The one saved with the adapter, when there is one: fine-tuning may have changed the chat template."""
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


def changes_of(stored: SafetensorsFiles, config: LoraConfig, base: "Source") -> dict[str, Change]:
    """Weight → change, every part of the shape that the base needs.

    Raises ExportError: a tensor of no weight of this base, or one that does not fit it.
    """
    parts: dict[str, dict[str, str]] = {}
    for name in stored.shapes:
        match = PART.fullmatch(name)
        if match is None or f"{match['module']}.weight" not in base.architecture.tensor_shapes():
            raise ExportError(f"{stored.file_of(name)}: tensor {name:.120} changes nothing that {why_not(name, base)}")
        parts.setdefault(match["module"], {})[match["part"]] = name
    if not parts:
        raise ExportError(f"{stored.folder}: the adapter holds no tensors; save it again with `save_pretrained`")
    found = {}
    for module, own in parts.items():
        weight = f"{module}.weight"
        refuse_tied(module, own, base)
        require_parts(stored, module, own, config, base.architecture.tensor_shapes()[weight])
        found[weight] = Change(own, config.scaling(module))
    return found


def why_not(name: str, base: "Source") -> str:
    """The rest of a sentence about a tensor that is not merged."""
    tied = base.architecture.tie_word_embeddings and ".lm_head." in name
    return "can change alone: the head is tied to the embedding" if tied else f"this base has; {by_hand()}"


def refuse_tied(module: str, own: Mapping[str, str], base: "Source") -> None:
    """Trained apart, embedding and head are not one table any more."""
    if module in TIED and base.architecture.tie_word_embeddings:
        raise ExportError(
            f"{next(iter(own.values()))}: the adapter changes {module}, but embedding and head are tied in this base; "
            "merge and save the model with tie_word_embeddings false, and give the result with --source"
        )


def require_parts(
    stored: SafetensorsFiles, module: str, own: Mapping[str, str], config: LoraConfig, shape: tuple[int, ...]
) -> None:
    """A and B of the rank that the configuration says, everything else of the base's shape."""
    rank = config.rank(module)
    wanted: dict[str, tuple[int, ...]] = {"weight": shape, "base_layer.weight": shape}
    if len(shape) == 2 and module == "model.embed_tokens":
        wanted |= {"lora_embedding_A": (rank, shape[0]), "lora_embedding_B": (shape[1], rank)}
    elif len(shape) == 2:
        wanted |= {"lora_A.weight": (rank, shape[1]), "lora_B.weight": (shape[0], rank)}
        wanted |= {"lora_magnitude_vector": (shape[0],)} if config.use_dora else {}
    for part, name in own.items():
        if part not in wanted:
            raise ExportError(f"{stored.file_of(name)}: tensor {name} is not merged into {module}; {by_hand()}")
        if stored.shapes[name] != wanted[part]:
            raise ExportError(
                f"{stored.file_of(name)}: tensor {name} has shape {list(stored.shapes[name])}, this base and rank "
                f"{rank} need {list(wanted[part])}"
            )
    matrices = [part for part in wanted if part.startswith("lora_")]
    missing = [part for part in matrices if part not in own]
    if missing and len(missing) < len(matrices):
        raise ExportError(f"{stored.folder}: the adapter has no {missing[0]} for {module}; save it again")
    if missing and not any(part in own for part in REPLACING):
        raise ExportError(f"{stored.folder}: the adapter has nothing to merge into {module}; save it again")
