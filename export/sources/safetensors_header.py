"""The header of a safetensors file with element types that the library does not know. Knows no model.

The library's own rules (safetensors `README.md`, "Format"): u64 length, a JSON object, every byte of the data in
exactly one tensor. Jlama writes its 4-bit weights so, as type `Q4`, which the library refuses.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ExportError
from ..plan import explain
from . import unique_json

MAX_HEADER_BYTES = 2**22
"""Less than the library's 100 MB: as Python's objects a header takes many times its size. A 3B model's has 60 kB."""
MAX_DIMENSIONS = 8
BITS = {"Q4": 4, "I8": 8, "U8": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64}
METADATA = "__metadata__"
Size = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class BrokenError(Exception):
    """What is wrong with the file."""


class Entry(BaseModel):
    """One tensor as the header states it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: Annotated[tuple[Size, ...], Field(max_length=MAX_DIMENSIONS)]
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """From the beginning of the file, bytes."""
    end: int

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def raw_header(path: Path) -> bytes:
    """The header's text, unread. Raises BrokenError, OSError."""
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise BrokenError("it is shorter than a header")
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER_BYTES:
            raise BrokenError(f"its header is said to have {length} bytes, at most {MAX_HEADER_BYTES} are read")
        text = file.read(length)
    if len(text) < length:
        raise BrokenError(f"its header of {length} bytes ends after the file")
    return text


def read(path: Path) -> Mapping[str, Tensor]:
    """Every tensor's place. Raises ExportError: a header that contradicts itself or the file."""
    try:
        text = raw_header(path)
        entries = entries_of(text)
        first = 8 + len(text)
        require_whole(entries, path.stat().st_size - first)
    except (BrokenError, ValueError, RecursionError) as error:
        raise damaged(path, " ".join(str(error).split())[:200]) from None
    return {
        name: Tensor(entry.dtype, entry.shape, first + entry.data_offsets[0], first + entry.data_offsets[1])
        for name, entry in entries.items()
    }


def refuse_repeated(path: Path) -> None:
    """A name twice, of which the library takes the last. Raises ExportError."""
    try:
        unique_json.loads(raw_header(path))
    except (BrokenError, ValueError, RecursionError) as error:
        raise damaged(path, " ".join(str(error).split())[:200]) from None


def entries_of(text: bytes) -> dict[str, Entry]:
    """The JSON object, without its metadata."""
    value = unique_json.loads(text)
    if not isinstance(value, dict):
        raise BrokenError(f"its header is a {type(value).__name__}")
    return {name: entry_of(name, fields) for name, fields in value.items() if name != METADATA}


def entry_of(name: str, fields: Any) -> Entry:
    """One tensor's."""
    try:
        return Entry.model_validate(fields)
    except ValidationError as error:
        raise BrokenError(f"tensor {name:.80}: {explain(error)}") from None


def require_whole(entries: Mapping[str, Entry], size: int) -> None:
    """Known types, sizes that fit, no overlap, no hole, nothing behind the last tensor."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in BITS:
            raise BrokenError(f"tensor {name:.80} is of unknown type {entry.dtype!r:.20}")
        start, end = entry.data_offsets
        if start != at:
            raise BrokenError(f"tensor {name:.80} begins at {start}, the one before ends at {at}")
        bits = Tensor(entry.dtype, entry.shape, start, end).elements * BITS[entry.dtype]
        if bits != 8 * (end - start):
            raise BrokenError(
                f"tensor {name:.80} of shape {list(entry.shape)} and type {entry.dtype} has {end - start} bytes"
            )
        at = end
    if at != size:
        raise BrokenError(f"its tensors have {at} bytes, its data {size}")


def damaged(path: Path, reason: str) -> ExportError:
    """One line about the file."""
    return ExportError(f"{path}: damaged safetensors ({reason}); download or save it again")
