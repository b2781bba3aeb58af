"""GPTQ-format linears in a Hugging Face folder (AutoGPTQ, GPTQModel).

A linear X is quantized exactly when the header has `X.qweight`; with 32/bits integers to an int32, lowest bits first,

    X.qweight int32 [K·bits/32, N]     X.qzeros int32 [groups, N·bits/32]     X.scales [groups, N]
    X.g_idx int32 [K], the group of each column; when it is not there, k // group_size

    W[n, k] = scales[g_idx[k], n] · (q[k, n] − zeros[g_idx[k], n])

`checkpoint_format` gptq stores every zero point less one, gptq_v2 as it is. Format: AutoGPTQ 0.7.1 `qlinear_cuda.py`
and GPTQModel `convert_gptq_v1_to_v2_format`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from export.checkpoints.integers import Integers, QuantizedFiles, Unfit
from export.checkpoints.safetensors import SafetensorsFiles
from export.errors import ExportError, explain

_QWEIGHT = ".qweight"
_PARTS = (".qzeros", ".scales", ".g_idx")
_SCALE_TYPES = ("F16", "BF16", "F32")
_WORD = 32
"""Bits of an int32."""
_ADVICE = "save it again with GPTQModel, or give a float checkpoint"


class _GptqConfig(BaseModel):
    """The deciding keys of `quantization_config` or quantize_config.json; the tensors show the rest."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    bits: Literal[4, 8]
    group_size: int
    """−1: one group for each row of the weight."""
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    pack_dtype: Literal["int32"] = "int32"
    is_marlin_format: Literal[False] = False

    @field_validator("group_size")
    @classmethod
    def _whole_or_positive(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("must be positive, or -1 for one group a row")
        return value

    @property
    def packed(self) -> int:
        """Integers in an int32."""
        return _WORD // self.bits

    @property
    def middle(self) -> int:
        """Zero point of a symmetric weight."""
        return 1 << (self.bits - 1)

    def group(self, columns: int) -> int:
        """Columns of a group."""
        return columns if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class _GptqWeights(QuantizedFiles):
    config: _GptqConfig
    config_path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.stored.files, *([self.config_path] if self.config_path.name != "config.json" else []))

    @property
    def description(self) -> str:
        """`GPTQ int4, groups of 128, all 210 linears`."""
        group = self.config.group_size
        groups = "one group a row" if group == -1 else f"groups of {group}"
        return f"GPTQ int{self.config.bits}, {groups}, {self.coverage()}"

    @staticmethod
    def owner(name: str) -> str | None:
        """`X.qweight`, `X.qzeros` … → `X`."""
        return next((name.removesuffix(suffix) for suffix in (_QWEIGHT, *_PARTS) if name.endswith(suffix)), None)

    def dequantize(self, name: str) -> torch.Tensor:
        """Takes 7 bytes for each element at its peak, 9 with float32 scales."""
        codes, zeros, scales, groups = self._parts(name)
        weight = codes.float()
        weight -= zeros[:, groups]
        weight *= scales[:, groups]
        return weight

    def unpack(self, name: str) -> Integers | Unfit:
        codes, zeros, scales, groups = self._parts(name)
        columns, middle = len(groups), self.config.middle
        group = self.config.group(columns)
        if columns % group:
            return Unfit(f"groups of {group} that do not divide {columns} columns")
        if not torch.equal(groups, _in_order(columns, group)):
            return Unfit("groups of columns that do not stand together (desc_act)")
        if not bool((zeros == middle).all()):
            return Unfit("zero points that are not the middle")
        qdata = (codes - middle).view(torch.int8)  # uint8 wraps around
        return Integers(qdata, scales.float(), self.config.bits)

    def _parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes uint8 [N, K], zero points uint8 and scales as stored [N, groups], the group of each column int64 [K].

        Raises ExportError: a tensor with numbers that no quantizer writes.
        """
        linear, columns = name.removesuffix(".weight"), self.quantized[name][1]
        qweight, qzeros, scales = self.stored.tensors([linear + _QWEIGHT, f"{linear}.qzeros", f"{linear}.scales"])
        if not bool(torch.isfinite(scales).all()):
            raise self.stored.damaged(f"{linear}.scales", "holds NaN or infinity", _ADVICE)
        groups = _in_order(columns, self.config.group(columns))
        if f"{linear}.g_idx" in self.stored.headers:
            groups = self.stored.tensor(f"{linear}.g_idx").long()
            if int(groups.min()) < 0 or int(groups.max()) >= len(scales):
                reason = f"names a group outside 0 … {len(scales) - 1}"
                raise self.stored.damaged(f"{linear}.g_idx", reason, _ADVICE)
        if self.config.checkpoint_format == "gptq":
            # GPTQModel subtracts 1 from each zero point as whole words, borrows included; adding whole words undoes it.
            qzeros = qzeros + sum(1 << i for i in range(0, _WORD, self.config.bits))
        codes = _unpacked(qweight.t(), self.config.bits)
        zeros = _unpacked(qzeros, self.config.bits).t()
        return codes, zeros, scales.t(), groups


def _in_order(columns: int, group: int) -> torch.Tensor:
    """The group of each column where groups are runs of columns, int64 [columns]."""
    return torch.arange(columns) // group


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C] → uint8 [R, C·32/bits], lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def open_weights(stored: SafetensorsFiles, config: Mapping[str, Any], path: Path) -> _GptqWeights:
    """Check every quantized linear's parts against the settings in `path`.

    Raises ExportError: settings or a form that is not read, or a contradiction, named.
    """
    try:
        settings = _GptqConfig.model_validate(config)
    except ValidationError as error:
        raise ExportError(f"{path}: GPTQ settings: {explain(error)}; {_ADVICE}") from None
    if not any(name.endswith(_QWEIGHT) for name in stored.shapes):
        raise ExportError(f"{path}: says GPTQ, but no tensor is a qweight; {_ADVICE}")
    quantized: dict[str, tuple[int, ...]] = {}
    for name, tensor in stored.headers.items():
        linear = _GptqWeights.owner(name)
        if linear is None:
            continue
        if linear + _QWEIGHT not in stored.shapes:
            raise stored.damaged(name, f"belongs to a quantized linear, but {linear}{_QWEIGHT} is missing", _ADVICE)
        if f"{linear}.weight" in stored.shapes:
            raise stored.damaged(name, f"is there, and {linear}.weight too", _ADVICE)
        if name.endswith(_QWEIGHT):
            _require_parts(stored, linear, settings)
            quantized[f"{linear}.weight"] = (tensor.shape[1], tensor.shape[0] * settings.packed)
    return _GptqWeights(stored, quantized, settings, path)


def _require_parts(stored: SafetensorsFiles, linear: str, config: _GptqConfig) -> None:
    """All parts there, of the type and shape that the packed integers and the settings give them."""
    qweight = stored.matrix(linear + _QWEIGHT, ("I32",), _ADVICE)
    rows, columns = qweight.shape[1], qweight.shape[0] * config.packed
    groups = -(-columns // config.group(columns))
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        ".qzeros": (("I32",), (groups, rows // config.packed)),
        ".scales": (_SCALE_TYPES, (groups, rows)),
        ".g_idx": (("I32",), (columns,)),
    }
    if linear + ".g_idx" not in stored.headers:
        del expected[".g_idx"]
    for suffix, (dtypes, shape) in expected.items():
        part = stored.part(linear + suffix, _ADVICE)
        if part.dtype not in dtypes or part.shape != shape or rows % config.packed:
            reason = (
                f"is {part.dtype} {list(part.shape)}, expected {'/'.join(dtypes)} {list(shape)} by qweight "
                f"{list(qweight.shape)}, {config.bits} bits and group_size {config.group_size}"
            )
            raise stored.damaged(linear + suffix, reason, _ADVICE)
