"""torchao's integer tensors in a Hugging Face folder (`TorchAoConfig` of transformers), read without torchao.

A weight X.weight is quantized exactly when the files' metadata has an entry of that name with `_tensor_data_names`:

    X._weight_qdata int8 [N, K]     X._weight_scale, X._weight_zero_point [N, K/group]     block_size [1, group]
    W[n, k] = (qdata[n, k] − zero_point[n, k // group]) · scale[n, k // group]

Format: torchao 0.18 `prototype/safetensors` and `IntxUnpackedToInt8Tensor`. Nothing is unpickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.architecture import Positive
from export.checkpoints import safetensors
from export.checkpoints.integers import Integers, QuantizedFiles, Unfit
from export.checkpoints.safetensors import SAVE_AGAIN, SafetensorsFiles, open_mapped
from export.errors import ExportError, explain

_KIND = "IntxUnpackedToInt8Tensor"
_PARTS = {"qdata": ("I8",), "scale": ("F16", "BF16", "F32"), "zero_point": ("I8", "F16", "BF16", "F32")}
_MARK = "._weight_"


class _TargetType(BaseModel):
    """As torchao writes it: `{"_type": "torch.dtype", "_data": "int4"}`."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: Literal["int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8"] = Field(alias="_data")

    @property
    def bits(self) -> int:
        return int(self.name.removeprefix("int"))


class _Intx(BaseModel):
    """The attributes that decide an IntxUnpackedToInt8Tensor's numbers; how activations are treated is the target's."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    target_dtype: _TargetType
    block_size: Annotated[list[Positive], Field(min_length=2, max_length=2)]


@dataclass(frozen=True)
class _TorchaoWeights(QuantizedFiles):
    tensors: Mapping[str, _Intx]
    """Of the quantized weights, by the weight's name."""

    @property
    def description(self) -> str:
        """`torchao int4, groups of 32, all 210 linears`."""
        kinds = {f"{tensor.target_dtype.name}, groups of {tensor.block_size[1]}" for tensor in self.tensors.values()}
        return f"torchao {' and '.join(sorted(kinds))}, {self.coverage()}"

    @staticmethod
    def owner(name: str) -> str | None:
        linear, mark, _ = name.partition(_MARK)
        return f"{linear}.weight" if mark else None

    def dequantize(self, name: str) -> torch.Tensor:
        """Takes 5 bytes for each element at its peak."""
        qdata, scale, zero = self._parts(name)
        weight = qdata.float()
        groups = weight.view(*scale.shape, -1)  # [N, groups, group]
        groups -= zero.float().unsqueeze(-1)
        groups *= scale.float().unsqueeze(-1)
        return weight

    def unpack(self, name: str) -> Integers | Unfit:
        qdata, scale, zero = self._parts(name)
        if bool(zero.any()):
            return Unfit("zero points that are not the middle")
        return Integers(qdata, scale.float(), self.tensors[name].target_dtype.bits)

    def _parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qdata, scale, zero_point. Raises ExportError: a tensor with numbers outside its type."""
        qdata, scale, zero = self.stored.tensors([_part(name, suffix) for suffix in _PARTS])
        for suffix, tensor in (("scale", scale), ("zero_point", zero)):
            if not bool(torch.isfinite(tensor).all()):
                raise self.stored.damaged(_part(name, suffix), "holds NaN or infinity")
        target = self.tensors[name].target_dtype
        half = 1 << (target.bits - 1)
        if int(qdata.min()) < -half or int(qdata.max()) >= half:
            raise self.stored.damaged(_part(name, "qdata"), f"holds numbers outside {target.name}")
        return qdata, scale, zero


def _part(name: str, suffix: str) -> str:
    """`X.weight`, `qdata` → `X._weight_qdata`."""
    return name.removesuffix(".weight") + _MARK + suffix


def open_weights(stored: SafetensorsFiles, path: Path) -> _TorchaoWeights:
    """Check every quantized weight's parts against the files' metadata; `path` is the file that names torchao.

    Raises ExportError: a kind of tensor that is not read, or a contradiction, named.
    """
    tensors: dict[str, _Intx] = {}
    for file in stored.files:
        for name, text in (open_mapped(file).metadata() or {}).items():
            if name not in ("format", "tensor_names") and (tensor := _tensor_of(file, name, text)) is not None:
                tensors[name] = tensor
    if not tensors:
        raise ExportError(f"{path}: says torchao, but no file's metadata describes a quantized tensor; {SAVE_AGAIN}")
    for name, tensor in tensors.items():
        _require_parts(stored, name, tensor)
    for name in stored.shapes:
        owner = _TorchaoWeights.owner(name)
        if owner is not None and owner not in tensors:
            raise stored.damaged(name, f"is there, but no metadata describes {owner}")
    return _TorchaoWeights(stored, {name: stored.shapes[_part(name, "qdata")] for name in tensors}, tensors)


def _tensor_of(file: Path, name: str, text: str) -> _Intx | None:
    """One entry of a file's metadata; None for a float tensor."""
    try:
        fields = safetensors.loads(text)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{file}: metadata of {name} is not valid JSON ({error}); {SAVE_AGAIN}") from None
    kind: Any = fields.get("_type") if isinstance(fields, dict) else None
    if kind == "Tensor":
        return None
    if kind != _KIND or not name.endswith(".weight"):
        raise ExportError(
            f"{file}: {name} is of torchao's type {kind!r:.60}; only {_KIND} is read (IntxWeightOnlyConfig, "
            "Int8DynamicActivationIntxWeightConfig); give a float checkpoint"
        )
    try:
        return _Intx.model_validate(fields.get("_data"))
    except ValidationError as error:
        raise ExportError(f"{file}: metadata of {name}: {explain(error)}; {SAVE_AGAIN}") from None


def _require_parts(stored: SafetensorsFiles, name: str, tensor: _Intx) -> None:
    """All parts there, of the types and shapes that the block size gives them."""
    for suffix, dtypes in _PARTS.items():
        stored.matrix(_part(name, suffix), dtypes)
    rows, columns = stored.shapes[_part(name, "qdata")]
    high, wide = tensor.block_size
    if high != 1 or columns % wide:
        reason = f"is {[rows, columns]}, which blocks of {[high, wide]} do not divide"
        raise stored.damaged(_part(name, "qdata"), reason)
    expected = (rows, columns // wide)
    for suffix in ("scale", "zero_point"):
        if (shape := stored.shapes[_part(name, suffix)]) != expected:
            reason = f"has shape {list(shape)}, expected {list(expected)} by its block_size"
            raise stored.damaged(_part(name, suffix), reason)
