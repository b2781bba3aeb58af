"""torchao's integer tensors in a Hugging Face folder (`TorchAoConfig` of transformers), read without torchao.

A weight X.weight is quantized exactly when the files' metadata has an entry of that name with `_tensor_data_names`:

    X._weight_qdata int8 [N, K]     X._weight_scale, X._weight_zero_point [N, K/group]     block_size [1, group]
    W[n, k] = (qdata[n, k] − zero_point[n, k // group]) · scale[n, k // group]

Format: torchao 0.18 `prototype/safetensors` and `IntxUnpackedToInt8Tensor`. Nothing is unpickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ExportError
from ..plan import Positive, explain
from . import unique_json
from .integers import Integers, Unfit
from .safetensors_files import SafetensorsFiles, open_mapped

KIND = "IntxUnpackedToInt8Tensor"
PARTS = {"qdata": ("I8",), "scale": ("F16", "BF16", "F32"), "zero_point": ("I8", "F16", "BF16", "F32")}
MARK = "._weight_"
ADVICE = "save it again with `save_pretrained`, or give a float checkpoint"


class TargetType(BaseModel):
    """As torchao writes it: `{"_type": "torch.dtype", "_data": "int4"}`."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: Literal["int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8"] = Field(alias="_data")

    @property
    def bits(self) -> int:
        return int(self.name.removeprefix("int"))


class Intx(BaseModel):
    """The attributes that decide an IntxUnpackedToInt8Tensor's numbers; how activations are treated is the target's."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    target_dtype: TargetType
    block_size: Annotated[list[Positive], Field(min_length=2, max_length=2)]


@dataclass(frozen=True)
class TorchaoWeights:
    """Some weights as integers, everything else in floats."""

    stored: SafetensorsFiles
    tensors: Mapping[str, Intx]
    """Of the quantized weights, by the weight's name."""

    @property
    def files(self) -> tuple[Path, ...]:
        return self.stored.files

    @property
    def description(self) -> str:
        """`torchao int4, groups of 32, all 210 linears`."""
        kinds = sorted({f"{one.target_dtype.name}, groups of {one.block_size[1]}" for one in self.tensors.values()})
        linears = [name for name in self.shapes if name.endswith("_proj.weight")]
        floats = sum(name not in self.tensors for name in linears)
        rest = f"{floats} of {len(linears)} linears in floats" if floats else f"all {len(linears)} linears"
        return f"torchao {' and '.join(kinds)}, {rest}"

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As in `Source`."""
        found = {name: shape for name, shape in self.stored.shapes.items() if MARK not in name}
        return found | {name: self.stored.shapes[part(name, "qdata")] for name in self.tensors}

    def read(self, name: str) -> torch.Tensor:
        """As in `Source`. Takes 5 bytes for each element at its peak."""
        if name not in self.tensors:
            return self.stored.read(name)
        qdata, scale, zero = self._parts(name)
        weight = qdata.float()
        groups = weight.view(*scale.shape, -1)  # [N, groups, group]
        groups -= zero.float().unsqueeze(-1)
        groups *= scale.float().unsqueeze(-1)
        return weight

    def integers(self, name: str) -> Integers | Unfit | None:
        """As in `Source`."""
        if name not in self.tensors:
            return None
        qdata, scale, zero = self._parts(name)
        if bool(zero.any()):
            return Unfit("zero points that are not the middle")
        return Integers(qdata, scale.float(), self.tensors[name].target_dtype.bits)

    def _parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qdata, scale, zero_point; numbers outside their type are an error that names their tensor."""
        qdata, scale, zero = self.stored.tensors([part(name, suffix) for suffix in PARTS])
        for suffix, tensor in (("scale", scale), ("zero_point", zero)):
            if not bool(torch.isfinite(tensor).all()):
                raise damaged(self.stored, part(name, suffix), "holds NaN or infinity")
        target = self.tensors[name].target_dtype
        half = 1 << (target.bits - 1)
        if int(qdata.min()) < -half or int(qdata.max()) >= half:
            raise damaged(self.stored, part(name, "qdata"), f"holds numbers outside {target.name}")
        return qdata, scale, zero


def part(name: str, suffix: str) -> str:
    """`X.weight`, `qdata` → `X._weight_qdata`."""
    return name.removesuffix(".weight") + MARK + suffix


def open_weights(stored: SafetensorsFiles, path: Path) -> TorchaoWeights:
    """Check every quantized weight's parts against the files' metadata; `path` says that torchao quantized them.

    Raises ExportError: a kind of tensor that is not read, or a contradiction, named.
    """
    tensors: dict[str, Intx] = {}
    for file in stored.files:
        for name, text in (open_mapped(file).metadata() or {}).items():
            if name not in ("format", "tensor_names") and (found := tensor_of(file, name, text)) is not None:
                tensors[name] = found
    if not tensors:
        raise ExportError(f"{path}: says torchao, but no file's metadata describes a quantized tensor; {ADVICE}")
    for name, tensor in tensors.items():
        require_parts(stored, name, tensor)
    for name in stored.shapes:
        linear, mark, _ = name.partition(MARK)
        if mark and f"{linear}.weight" not in tensors:
            raise damaged(stored, name, f"is there, but no metadata describes {linear}.weight")
    return TorchaoWeights(stored, tensors)


def tensor_of(file: Path, name: str, text: str) -> Intx | None:
    """One entry of a file's metadata; None for a float tensor."""
    try:
        fields = unique_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{file}: metadata of {name} is not valid JSON ({error}); {ADVICE}") from None
    kind: Any = fields.get("_type") if isinstance(fields, dict) else None
    if kind == "Tensor":
        return None
    if kind != KIND or not name.endswith(".weight"):
        raise ExportError(
            f"{file}: {name} is of torchao's type {kind!r:.60}; only {KIND} is read (IntxWeightOnlyConfig, "
            "Int8DynamicActivationIntxWeightConfig); give a float checkpoint"
        )
    try:
        return Intx.model_validate(fields.get("_data"))
    except ValidationError as error:
        raise ExportError(f"{file}: metadata of {name}: {explain(error)}; {ADVICE}") from None


def require_parts(stored: SafetensorsFiles, name: str, tensor: Intx) -> None:
    """All parts there, of the types and shapes that the block size gives them."""
    for suffix, dtypes in PARTS.items():
        found = stored.stored.get(part(name, suffix))
        if found is None:
            raise ExportError(f"{stored.folder}: tensor {part(name, suffix)} is missing; {ADVICE}")
        if found.dtype not in dtypes or len(found.shape) != 2 or not found.elements:
            shown = f"{found.dtype} {list(found.shape)}"
            raise damaged(stored, part(name, suffix), f"is {shown}, expected a matrix of {'/'.join(dtypes)}")
    rows, columns = stored.shapes[part(name, "qdata")]
    high, wide = tensor.block_size
    if high != 1 or columns % wide:
        raise damaged(
            stored, part(name, "qdata"), f"is {[rows, columns]}, which blocks of {[high, wide]} do not divide"
        )
    for suffix in ("scale", "zero_point"):
        if (shape := stored.shapes[part(name, suffix)]) != (rows, columns // wide):
            wanted = [rows, columns // wide]
            raise damaged(stored, part(name, suffix), f"has shape {list(shape)}, expected {wanted} by its block_size")


def damaged(stored: SafetensorsFiles, name: str, what: str) -> ExportError:
    """An error about one tensor."""
    return ExportError(f"{stored.file_of(name)}: tensor {name} {what}; {ADVICE}")
