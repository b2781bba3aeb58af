"""bitsandbytes 4-bit weights in a Hugging Face folder (QLoRA, Unsloth), dequantized with torch alone.

A linear X is quantized exactly when the header has `X.weight.quant_state.*`; config.json may only agree.

    absmax = nested_quant_map[absmax] · nested_absmax[i // nested_blocksize] + nested_offset     block i, when nested
    W.flatten()[j] = quant_map[code j] · absmax[j // blocksize]           code 2i in the high nibble of byte i

Format: bitsandbytes `QuantState.as_dict` and `backends/default/ops.py`; checked bit for bit against it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from export.architecture import Positive
from export.checkpoints import safetensors
from export.checkpoints.integers import OFFSET, TABLES, Integers, QuantizedFiles, Unfit
from export.checkpoints.safetensors import SAVE_AGAIN, SafetensorsFiles
from export.errors import ExportError, explain

STATE = ".quant_state."
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_KIND = "bitsandbytes__"
_MAX_STATE_BYTES = 4096
"""Of a quant state's JSON; bitsandbytes writes 200."""
_LEVELS, _NESTED_LEVELS = 16, 256


class _QuantState(BaseModel):
    """The JSON that bitsandbytes writes beside a weight."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    quant_type: Literal["nf4", "fp4"]
    blocksize: Positive
    dtype: str
    """What bitsandbytes rounds its products to. Not done here: they stay float32."""
    shape: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    nested_blocksize: Positive | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _nested_whole(self) -> "_QuantState":
        nested = (self.nested_blocksize, self.nested_dtype, self.nested_offset)
        if any(part is None for part in nested) and any(part is not None for part in nested):
            raise ValueError("nested_blocksize, nested_dtype and nested_offset belong together")
        return self

    @property
    def nested(self) -> bool:
        """Whether absmax is itself quantized."""
        return self.nested_blocksize is not None

    @property
    def elements(self) -> int:
        """Of the weight."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Each with an absmax; the last one may be short."""
        return -(-self.elements // self.blocksize)

    def companions(self) -> dict[str, tuple[str, int]]:
        """Suffix → element type and count of the tensors that belong to the weight."""
        companions = {".absmax": ("U8" if self.nested else "F32", self.blocks), ".quant_map": ("F32", _LEVELS)}
        if self.nested_blocksize:
            companions[".nested_absmax"] = ("F32", -(-self.blocks // self.nested_blocksize))
            companions[".nested_quant_map"] = ("F32", _NESTED_LEVELS)
        return companions


@dataclass(frozen=True)
class _Bnb4BitWeights(QuantizedFiles):
    states: Mapping[str, _QuantState]
    """Of the quantized weights, by the weight's name."""

    @property
    def description(self) -> str:
        """`bitsandbytes NF4, nested, 3 of 210 linears in bf16`."""
        kinds = sorted({state.quant_type.upper() for state in self.states.values()})
        nested = sorted({"nested" if state.nested else "not nested" for state in self.states.values()})
        types = sorted({self.stored.headers[name].dtype.lower() for name in self.float_linears})
        return f"bitsandbytes {' and '.join(kinds)}, {' and '.join(nested)}, {self.coverage(' and '.join(types))}"

    @staticmethod
    def owner(name: str) -> str | None:
        """`X.weight.absmax`, `X.weight.quant_state.…` → `X.weight`."""
        weight, state, _ = name.partition(STATE)
        if state:
            return weight
        suffixes = (suffix for suffix in _COMPANIONS if name.endswith(f".weight{suffix}"))
        return next((name.removesuffix(suffix) for suffix in suffixes), None)

    def dequantize(self, name: str) -> torch.Tensor:
        """Takes 6 bytes for each element at its peak."""
        state = self.states[name]
        octets, parts = self._parts(name)
        pairs = _pairs_of(parts[".quant_map"]).index_select(0, octets.int())  # [bytes, 2]
        return _scaled(pairs.flatten()[: state.elements], _absmax_of(state, parts), state.blocksize).view(state.shape)

    def unpack(self, name: str) -> Integers | Unfit:
        """Codes of the type's levels."""
        state = self.states[name]
        rows, columns = state.shape
        if columns % state.blocksize:
            return Unfit(f"blocks of {state.blocksize} that go on in the next row")
        octets, parts = self._parts(name)
        if not torch.equal(parts[".quant_map"].flatten(), TABLES[state.quant_type]):
            return Unfit(f"levels that are not {state.quant_type.upper()}'s")
        codes = torch.stack((octets >> 4, octets & 15), dim=1) - OFFSET  # uint8 wraps around
        scale = _absmax_of(state, parts).view(rows, columns // state.blocksize)
        return Integers(codes.view(torch.int8).view(rows, columns), scale, 4, state.quant_type)

    def _parts(self, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Packed codes, uint8 [bytes]; suffix → tensor of the weight's companions."""
        suffixes = list(self.states[name].companions())
        packed, *parts = self.stored.tensors([name, *(name + suffix for suffix in suffixes)])
        return packed.contiguous().view(torch.uint8).flatten(), dict(zip(suffixes, parts, strict=True))


def _pairs_of(table: torch.Tensor) -> torch.Tensor:
    """Byte → the two values it holds, the high nibble's first: float32 [256, 2]."""
    byte = torch.arange(256)
    return torch.stack((table[byte >> 4], table[byte & 15]), dim=1)


def _absmax_of(state: _QuantState, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One factor for each block, float32 [blocks]."""
    if state.nested_blocksize is None or state.nested_offset is None:
        return parts[".absmax"].flatten()
    values = parts[".nested_quant_map"].flatten()[parts[".absmax"].flatten().int()]
    return _scaled(values, parts[".nested_absmax"].flatten(), state.nested_blocksize) + state.nested_offset


def _scaled(values: torch.Tensor, factors: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Multiply each run of `blocksize` values [n] by its factor, in place; the last run may be short."""
    whole = len(values) // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(factors[:whole, None])
    values[whole * blocksize :].mul_(factors[-1])
    return values


def open_weights(stored: SafetensorsFiles, config: Mapping[str, Any], path: Path) -> _Bnb4BitWeights:
    """Check every quantized weight's companions against its state, and config.json (at `path`) against the header.

    Raises ExportError: a contradiction, named.
    """
    names = [name for name in stored.shapes if STATE in name]
    if not names:
        raise ExportError(f"{path}: says bitsandbytes 4-bit, but no tensor has a quant_state; {SAVE_AGAIN}")
    for name in names:
        if stored.headers[name].dtype != "U8" or stored.headers[name].elements > _MAX_STATE_BYTES:
            raise stored.damaged(name, f"is no JSON of at most {_MAX_STATE_BYTES} bytes")
    states: dict[str, _QuantState] = {}
    for name, raw in zip(names, stored.tensors(names), strict=True):
        weight = name.partition(STATE)[0]
        if weight in states:
            raise stored.damaged(name, "is a second quant_state of one weight")
        states[weight] = _state_of(stored, name, bytes(raw.flatten().tolist()))
        _require_companions(stored, weight, states[weight])
    for name in stored.shapes:
        if (owner := _Bnb4BitWeights.owner(name)) is not None and owner not in states:
            raise stored.damaged(name, f"belongs to a quantized weight, but {owner}{STATE}* is missing")
    _refuse_contradictions(config, path, list(states.values()))
    return _Bnb4BitWeights(stored, {name: tuple(state.shape) for name, state in states.items()}, states)


def _state_of(stored: SafetensorsFiles, name: str, text: bytes) -> _QuantState:
    """The state, of the type its name says."""
    try:
        state = _QuantState.model_validate(safetensors.loads(text))
    except ValidationError as error:
        raise stored.damaged(name, explain(error)) from None
    except (ValueError, RecursionError) as error:
        raise stored.damaged(name, f"is not valid JSON ({error})") from None
    if (kind := name.partition(STATE)[2]) != _KIND + state.quant_type:
        raise stored.damaged(name, f"says quant_type {state.quant_type!r}, its name says {kind!r}")
    return state


def _require_companions(stored: SafetensorsFiles, weight: str, state: _QuantState) -> None:
    """All parts there, of the type and size that the state says."""
    for suffix, (dtype, count) in state.companions().items():
        part = stored.part(weight + suffix)
        if (part.dtype, part.elements) != (dtype, count):
            reason = f"has {part.elements} elements of {part.dtype}, expected {count} of {dtype}"
            raise stored.damaged(weight + suffix, reason)
    packed, size = stored.part(weight), (state.elements + 1) // 2
    if packed.bits != 8 * size:
        reason = f"has {packed.elements} elements of {packed.dtype}; 4 bits of shape {state.shape} are {size} bytes"
        raise stored.damaged(weight, reason)
    unwanted = [s for s in _COMPANIONS if s not in state.companions() and weight + s in stored.headers]
    if unwanted:
        raise stored.damaged(weight + unwanted[0], "is there, but the quant_state is not nested")


def _refuse_contradictions(config: Mapping[str, Any], path: Path, states: Sequence[_QuantState]) -> None:
    """config.json must agree with the tensors on what it mentions."""
    by_tensors: dict[str, list[Any]] = {
        "bnb_4bit_quant_type": [state.quant_type for state in states],
        "bnb_4bit_use_double_quant": [state.nested for state in states],
    }
    for key, values in by_tensors.items():
        if key in config and config[key] not in values:
            tensors = " and ".join(sorted({repr(value) for value in values}))
            raise ExportError(f"{path}: {key} is {config[key]!r:.60}, but the tensors say {tensors}; {SAVE_AGAIN}")
