"""bitsandbytes 4-bit weights in a Hugging Face folder (QLoRA, Unsloth), dequantized with torch alone.

A linear X is quantized exactly when the header has `X.weight.quant_state.*`; config.json may only agree.

    absmax = nested_quant_map[absmax] · nested_absmax[i // nested_blocksize] + nested_offset     block i, when nested
    W.flatten()[j] = quant_map[code j] · absmax[j // blocksize]           code 2i in the high nibble of byte i

Format: bitsandbytes `QuantState.as_dict` and `backends/default/ops.py`; checked bit for bit against it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import ExportError
from ..levels import OFFSET, TABLES
from ..plan import Positive, explain
from . import unique_json
from .integers import Integers, Unfit
from .safetensors_files import SafetensorsFiles

STATE = ".quant_state."
COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
KIND = "bitsandbytes__"
MAX_STATE_BYTES = 4096
"""Of a quant state's JSON; bitsandbytes writes 200."""
ADVICE = "save it again with `save_pretrained`, or give a float checkpoint"
LEVELS, NESTED_LEVELS = 16, 256


class QuantState(BaseModel):
    """The JSON that bitsandbytes keeps beside a weight."""

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
    def _nested_whole(self) -> "QuantState":
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
        wanted = {".absmax": ("U8" if self.nested else "F32", self.blocks), ".quant_map": ("F32", LEVELS)}
        if self.nested_blocksize:
            wanted[".nested_absmax"] = ("F32", -(-self.blocks // self.nested_blocksize))
            wanted[".nested_quant_map"] = ("F32", NESTED_LEVELS)
        return wanted


@dataclass(frozen=True)
class Bnb4BitWeights:
    """Some linears in 4 bits, everything else in floats."""

    stored: SafetensorsFiles
    states: Mapping[str, QuantState]
    """Of the quantized weights, by the weight's name."""

    @property
    def files(self) -> tuple[Path, ...]:
        return self.stored.files

    @property
    def description(self) -> str:
        """`bitsandbytes NF4, nested, 3 of 210 linears in bf16`."""
        kinds = sorted({state.quant_type.upper() for state in self.states.values()})
        nested = sorted({"nested" if state.nested else "not nested" for state in self.states.values()})
        kept = [name for name in self.shapes if name.endswith("_proj.weight") and name not in self.states]
        types = sorted({self.stored.stored[name].dtype.lower() for name in kept})
        linears = sum(name.endswith("_proj.weight") for name in self.shapes)
        rest = f"{len(kept)} of {linears} linears in {' and '.join(types)}" if kept else f"all {linears} linears"
        return f"bitsandbytes {' and '.join(kinds)}, {' and '.join(nested)}, {rest}"

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As in `Source`: of what the weights stand for."""
        plain = {name: shape for name, shape in self.stored.shapes.items() if weight_of(name) is None}
        return plain | {name: tuple(state.shape) for name, state in self.states.items()}

    def read(self, name: str) -> torch.Tensor:
        """As in `Source`. Takes 6 bytes for each element at its peak."""
        state = self.states.get(name)
        if state is None:
            return self.stored.read(name)
        suffixes = list(state.companions())
        packed, *parts = self.stored.tensors([name, *(name + suffix for suffix in suffixes)])
        found = dict(zip(suffixes, parts, strict=True))
        codes = packed.contiguous().view(torch.uint8).flatten()
        pairs = pairs_of(found[".quant_map"]).index_select(0, codes.int())  # [bytes, 2]
        return scaled(pairs.flatten()[: state.elements], absmax_of(state, found), state.blocksize).view(state.shape)

    def integers(self, name: str) -> Integers | Unfit | None:
        """As in `Source`: codes of the type's levels."""
        state = self.states.get(name)
        if state is None:
            return None
        rows, columns = state.shape
        if columns % state.blocksize:
            return Unfit(f"blocks of {state.blocksize} that go on in the next row")
        suffixes = list(state.companions())
        packed, *parts = self.stored.tensors([name, *(name + suffix for suffix in suffixes)])
        found = dict(zip(suffixes, parts, strict=True))
        if not torch.equal(found[".quant_map"].flatten(), TABLES[state.quant_type]):
            return Unfit(f"levels that are not {state.quant_type.upper()}'s")
        octets = packed.contiguous().view(torch.uint8).flatten()
        codes = torch.stack((octets >> 4, octets & 15), dim=1) - OFFSET  # uint8 wraps around
        scale = absmax_of(state, found).view(rows, columns // state.blocksize)
        return Integers(codes.view(torch.int8).view(rows, columns), scale, 4, state.quant_type)


def pairs_of(table: torch.Tensor) -> torch.Tensor:
    """Byte → the two values it holds, the high nibble's first: float32 [256, 2]."""
    byte = torch.arange(256)
    return torch.stack((table[byte >> 4], table[byte & 15]), dim=1)


def absmax_of(state: QuantState, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One factor for each block, float32 [blocks]."""
    if state.nested_blocksize is None or state.nested_offset is None:
        return found[".absmax"].flatten()
    values = found[".nested_quant_map"].flatten()[found[".absmax"].flatten().int()]
    return scaled(values, found[".nested_absmax"].flatten(), state.nested_blocksize) + state.nested_offset


def scaled(values: torch.Tensor, factors: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Multiply each run of `blocksize` values [n] by its factor, in place; the last run may be short."""
    whole = len(values) // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(factors[:whole, None])
    values[whole * blocksize :].mul_(factors[-1])
    return values


def weight_of(name: str) -> str | None:
    """`X.weight.absmax`, `X.weight.quant_state.…` → `X.weight`; None for a tensor of its own."""
    weight, state, _ = name.partition(STATE)
    if state:
        return weight
    for suffix in COMPANIONS:
        if name.endswith(f".weight{suffix}"):
            return name.removesuffix(suffix)
    return None


def open_weights(stored: SafetensorsFiles, config: Mapping[str, Any], path: Path) -> Bnb4BitWeights:
    """Check every quantized weight's companions against its state, and config.json (`path`) against the header.

    Raises ExportError: a contradiction, named.
    """
    names = [name for name in stored.shapes if STATE in name]
    if not names:
        raise ExportError(f"{path}: says bitsandbytes 4-bit, but no tensor has a quant_state; {ADVICE}")
    for name in names:
        if stored.stored[name].dtype != "U8" or stored.stored[name].elements > MAX_STATE_BYTES:
            raise damaged(stored, name, f"is no JSON of at most {MAX_STATE_BYTES} bytes")
    states: dict[str, QuantState] = {}
    for name, raw in zip(names, stored.tensors(names), strict=True):
        weight = name.partition(STATE)[0]
        if weight in states:
            raise damaged(stored, name, "is a second quant_state of one weight")
        states[weight] = state_of(stored, name, bytes(raw.flatten().tolist()))
        require_companions(stored, weight, states[weight])
    for name in stored.shapes:
        if (owner := weight_of(name)) is not None and owner not in states:
            raise damaged(stored, name, f"belongs to a quantized weight, but {owner}{STATE}* is missing")
    refuse_contradictions(config, path, list(states.values()))
    return Bnb4BitWeights(stored, states)


def state_of(stored: SafetensorsFiles, name: str, text: bytes) -> QuantState:
    """The state, of the type its name says."""
    try:
        state = QuantState.model_validate(unique_json.loads(text))
    except ValidationError as error:
        raise damaged(stored, name, explain(error)) from None
    except (ValueError, RecursionError) as error:
        raise damaged(stored, name, f"is not valid JSON ({error})") from None
    if (kind := name.partition(STATE)[2]) != KIND + state.quant_type:
        raise damaged(stored, name, f"says quant_type {state.quant_type!r}, its name says {kind!r}")
    return state


def require_companions(stored: SafetensorsFiles, weight: str, state: QuantState) -> None:
    """All parts there, of the type and size that the state says."""
    for suffix, (dtype, count) in state.companions().items():
        part = stored.stored.get(weight + suffix)
        if part is None:
            raise ExportError(f"{stored.folder}: tensor {weight}{suffix} is missing; {ADVICE}")
        if (part.dtype, part.elements) != (dtype, count):
            raise damaged(
                stored, weight + suffix, f"has {part.elements} elements of {part.dtype}, expected {count} of {dtype}"
            )
    packed = stored.stored.get(weight)
    if packed is None:
        raise ExportError(f"{stored.folder}: tensor {weight} is missing; {ADVICE}")
    if packed.bytes != (state.elements + 1) // 2:
        raise damaged(
            stored,
            weight,
            f"has {packed.elements} elements of {packed.dtype}; 4 bits of shape {state.shape} are "
            f"{(state.elements + 1) // 2} bytes",
        )
    unwanted = [s for s in COMPANIONS if s not in state.companions() and weight + s in stored.stored]
    if unwanted:
        raise damaged(stored, weight + unwanted[0], "is there, but the quant_state is not nested")


def refuse_contradictions(config: Mapping[str, Any], path: Path, states: Sequence[QuantState]) -> None:
    """What config.json says must be what the header shows; it may also say nothing."""
    shown: dict[str, list[Any]] = {
        "bnb_4bit_quant_type": [state.quant_type for state in states],
        "bnb_4bit_use_double_quant": [state.nested for state in states],
    }
    for key, values in shown.items():
        if key in config and config[key] not in values:
            found = " and ".join(sorted({repr(value) for value in values}))
            raise ExportError(f"{path}: {key} is {config[key]!r:.60}, but the tensors say {found}; {ADVICE}")


def damaged(stored: SafetensorsFiles, name: str, what: str) -> ExportError:
    """An error about one tensor."""
    return ExportError(f"{stored.file_of(name)}: tensor {name} {what}; {ADVICE}")
