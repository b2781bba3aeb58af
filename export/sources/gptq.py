"""GPTQ-format linears in a Hugging Face folder (AutoGPTQ, GPTQModel): dequantized, or their integers as they are.

A linear X is quantized exactly when the header has `X.qweight`; with 32/bits integers to an int32, lowest bits first,

    X.qweight int32 [K·bits/32, N]     X.qzeros int32 [groups, N·bits/32]     X.scales [groups, N]
    X.g_idx int32 [K], the group of each column; when it is not there, k // group_size

    W[n, k] = scales[g_idx[k], n] · (q[k, n] − zeros[g_idx[k], n])

`checkpoint_format` gptq stores every zero point less one, gptq_v2 as it is. Format: AutoGPTQ 0.7.1 `qlinear_cuda.py`
and GPTQModel `convert_gptq_v1_to_v2_format`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ..errors import ExportError
from ..plan import explain
from .integers import Integers, Unfit
from .safetensors_files import SafetensorsFiles

QWEIGHT = ".qweight"
PARTS = (".qzeros", ".scales", ".g_idx")
SCALE_TYPES = ("F16", "BF16", "F32")
WORD = 32
"""Bits of an int32."""
ADVICE = "save it again with GPTQModel, or give a float checkpoint"


class GptqConfig(BaseModel):
    """What must be known of `quantization_config` or quantize_config.json; the tensors show the rest."""

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
        return WORD // self.bits

    @property
    def middle(self) -> int:
        """Zero point of a symmetric weight."""
        return 1 << (self.bits - 1)

    def group(self, columns: int) -> int:
        """Columns of a group."""
        return columns if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class Packed:
    """The unpacked parts of one weight."""

    codes: torch.Tensor
    """uint8 [N, K]"""
    zeros: torch.Tensor
    """uint8 [N, groups]"""
    scales: torch.Tensor
    """float16, bfloat16 or float32 [N, groups]"""
    groups: torch.Tensor
    """int64 [K]: the group of each column."""


@dataclass(frozen=True)
class GptqWeights:
    """Some linears as packed integers, everything else in floats."""

    stored: SafetensorsFiles
    config: GptqConfig
    config_path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.stored.files, *([self.config_path] if self.config_path.name != "config.json" else []))

    @property
    def description(self) -> str:
        """`GPTQ int4, groups of 128, all 210 linears`."""
        group = self.config.group_size
        groups = "one group a row" if group == -1 else f"groups of {group}"
        linears = [name for name in self.shapes if name.endswith("_proj.weight")]
        floats = sum(not self._quantized(name) for name in linears)
        rest = f"{floats} of {len(linears)} linears in floats" if floats else f"all {len(linears)} linears"
        return f"GPTQ int{self.config.bits}, {groups}, {rest}"

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As in `Source`: of what the weights stand for."""
        found: dict[str, tuple[int, ...]] = {}
        for name, tensor in self.stored.stored.items():
            linear = linear_of(name)
            if linear is None:
                found[name] = tensor.shape
            elif name.endswith(QWEIGHT):
                found[f"{linear}.weight"] = (tensor.shape[1], tensor.shape[0] * self.config.packed)
        return found

    def read(self, name: str) -> torch.Tensor:
        """As in `Source`. Takes 7 bytes for each element at its peak, 9 with float32 scales."""
        if not self._quantized(name):
            return self.stored.read(name)
        packed = self._packed(name)
        weight = packed.codes.float()
        weight -= packed.zeros[:, packed.groups]
        weight *= packed.scales[:, packed.groups]
        return weight

    def integers(self, name: str) -> Integers | Unfit | None:
        """As in `Source`."""
        if not self._quantized(name):
            return None
        packed, group = self._packed(name), self.config.group(self.shapes[name][1])
        if len(packed.groups) % group:
            return Unfit(f"groups of {group} that do not divide {len(packed.groups)} columns")
        if not torch.equal(packed.groups, in_order(len(packed.groups), group)):
            return Unfit("groups of columns that do not stand together (desc_act)")
        if not bool((packed.zeros == self.config.middle).all()):
            return Unfit("zero points that are not the middle")
        qdata = (packed.codes - self.config.middle).view(torch.int8)  # uint8 wraps around
        return Integers(qdata, packed.scales.float(), self.config.bits)

    def _quantized(self, name: str) -> bool:
        return name.removesuffix(".weight") + QWEIGHT in self.stored.stored

    def _packed(self, name: str) -> Packed:
        """One weight's parts; numbers that no quantizer writes are an error that names their tensor."""
        linear, columns = name.removesuffix(".weight"), self.shapes[name][1]
        group = self.config.group(columns)
        qweight, qzeros, scales = self.stored.tensors([linear + QWEIGHT, f"{linear}.qzeros", f"{linear}.scales"])
        if not bool(torch.isfinite(scales).all()):
            raise damaged(self.stored, f"{linear}.scales", "holds NaN or infinity")
        groups = in_order(columns, group)
        if f"{linear}.g_idx" in self.stored.stored:
            groups = self.stored.tensor(f"{linear}.g_idx").long()
            if int(groups.min()) < 0 or int(groups.max()) >= len(scales):
                raise damaged(self.stored, f"{linear}.g_idx", f"names a group outside 0 … {len(scales) - 1}")
        if self.config.checkpoint_format == "gptq":
            # GPTQModel takes one from each as whole words, borrows included; so they are given back.
            qzeros = qzeros + sum(1 << i for i in range(0, WORD, self.config.bits))
        codes = unpacked(qweight.t(), self.config.bits)
        zeros = unpacked(qzeros, self.config.bits).t()
        return Packed(codes, zeros, scales.t(), groups)


def in_order(columns: int, group: int) -> torch.Tensor:
    """Group of each column where groups are of neighbours, int64 [columns]."""
    return torch.arange(columns) // group


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C] → uint8 [R, C·32/bits], lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def linear_of(name: str) -> str | None:
    """`X.qweight`, `X.qzeros`, … → `X`; None for a tensor of its own."""
    for suffix in (QWEIGHT, *PARTS):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def open_weights(stored: SafetensorsFiles, config: Mapping[str, Any], path: Path) -> GptqWeights:
    """Check every quantized linear's parts against the settings in `path`.

    Raises ExportError: settings or a form that is not read, or a contradiction, named.
    """
    try:
        settings = GptqConfig.model_validate(config)
    except ValidationError as error:
        raise ExportError(f"{path}: GPTQ settings: {explain(error)}; {ADVICE}") from None
    if not any(name.endswith(QWEIGHT) for name in stored.shapes):
        raise ExportError(f"{path}: says GPTQ, but no tensor is a qweight; {ADVICE}")
    for name in stored.shapes:
        linear = linear_of(name)
        if linear is None:
            continue
        if linear + QWEIGHT not in stored.shapes:
            raise damaged(stored, name, f"belongs to a quantized linear, but {linear}{QWEIGHT} is missing")
        if f"{linear}.weight" in stored.shapes:
            raise damaged(stored, name, f"is there, and {linear}.weight too")
        if name.endswith(QWEIGHT):
            require_parts(stored, linear, settings)
    return GptqWeights(stored, settings, path)


def require_parts(stored: SafetensorsFiles, linear: str, config: GptqConfig) -> None:
    """All parts there, of the type and shape that the packed integers and the settings give them."""
    qweight = stored.stored[linear + QWEIGHT]
    if qweight.dtype != "I32" or len(qweight.shape) != 2 or not qweight.elements:
        found = f"{qweight.dtype} {list(qweight.shape)}"
        raise damaged(stored, linear + QWEIGHT, f"is {found}, expected a matrix of I32")
    rows, columns = qweight.shape[1], qweight.shape[0] * config.packed
    groups = -(-columns // config.group(columns))
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        ".qzeros": (("I32",), (groups, rows // config.packed)),
        ".scales": (SCALE_TYPES, (groups, rows)),
        ".g_idx": (("I32",), (columns,)),
    }
    for suffix, (dtypes, shape) in wanted.items():
        part = stored.stored.get(linear + suffix)
        if part is None and suffix == ".g_idx":
            continue
        if part is None:
            raise ExportError(f"{stored.folder}: tensor {linear}{suffix} is missing; {ADVICE}")
        if part.dtype not in dtypes or part.shape != shape or rows % config.packed:
            said = f"qweight {list(qweight.shape)}, {config.bits} bits and group_size {config.group_size}"
            raise damaged(
                stored,
                linear + suffix,
                f"is {part.dtype} {list(part.shape)}, expected {'/'.join(dtypes)} {list(shape)} by {said}",
            )


def damaged(stored: SafetensorsFiles, name: str, what: str) -> ExportError:
    """An error about one tensor."""
    return ExportError(f"{stored.file_of(name)}: tensor {name} {what}; {ADVICE}")
