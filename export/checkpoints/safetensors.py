"""Safetensors files and the JSON beside them: one file's header by our own reader, and a folder's files by the library.

The library reads neither Jlama's element types nor refuses a name that a header holds twice.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from export.errors import ExportError, explain

from .files import decoded, first_bytes, missing, other_form, require_contents

_MAX_JSON_BYTES = 2**24
"""Of a configuration or an index; the index of 405B takes 0.1 MB."""


def loads(text: str | bytes) -> Any:
    """JSON whose objects hold each key once: of two values one reader would check the first and another use the second.

    Raises ValueError: no JSON, bytes that are no UTF-8, or a key twice; RecursionError: nested too deep.
    """
    return json.loads(text if isinstance(text, str) else decoded(text), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"{key!r:.80} is there twice")
        fields[key] = value
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ExportError: not one, or too large."""
    require_contents(path)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ExportError(f"{path}: larger than {_MAX_JSON_BYTES} bytes, which no such file is")
        value = loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


_MAX_HEADER_BYTES = 2**22
"""Less than the library's 100 MB: as Python's objects a header takes many times its size. A 3B model's has 60 kB."""
_MAX_DIMENSIONS = 8
_BITS = {"Q4": 4, "I8": 8, "U8": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64}
_METADATA = "__metadata__"
_Size = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class BrokenError(Exception):
    """What is wrong with the file."""


_BROKEN = (BrokenError, ValueError, RecursionError)
"""What reading a header raises."""


class _Entry(BaseModel):
    """One tensor as the header states it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: Annotated[tuple[_Size, ...], Field(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]


@dataclass(frozen=True)
class Stored:
    """What a header says of one tensor."""

    dtype: str
    """As safetensors writes it: `BF16`, `U8` …"""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bits(self) -> int | None:
        """Of all elements; None for a type that no weight comes in."""
        size = _BITS.get(self.dtype)
        return None if size is None else size * self.elements


@dataclass(frozen=True)
class Tensor(Stored):
    """The same, and where the tensor lies."""

    start: int
    """From the beginning of the file, bytes."""
    end: int


def raw_header(path: Path) -> bytes:
    """The header's text, unread. Raises BrokenError, OSError; ExportError: something else in the file's place."""
    require_contents(path)
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise BrokenError("it is shorter than a header")
        (length,) = struct.unpack("<Q", first)
        if length > _MAX_HEADER_BYTES:
            raise BrokenError(f"its header is said to have {length} bytes, at most {_MAX_HEADER_BYTES} are read")
        text = file.read(length)
    if len(text) < length:
        raise BrokenError(f"its header of {length} bytes ends after the file")
    return text


def read(path: Path) -> Mapping[str, Tensor]:
    """Name → place of every tensor. Raises ExportError: a header that contradicts itself or the file."""
    try:
        text = raw_header(path)
        entries = _entries_of(loads(text))
        first = 8 + len(text)
        _require_whole(entries, path.stat().st_size - first)
    except _BROKEN as error:
        raise damaged(path, error) from None
    return {
        name: Tensor(entry.dtype, entry.shape, first + entry.data_offsets[0], first + entry.data_offsets[1])
        for name, entry in entries.items()
    }


def _entries_of(value: Any) -> dict[str, _Entry]:
    """The header's tensors, without its metadata."""
    if not isinstance(value, dict):
        raise BrokenError(f"its header is a {type(value).__name__}")
    return {name: _entry_of(name, fields) for name, fields in value.items() if name != _METADATA}


def _entry_of(name: str, fields: Any) -> _Entry:
    try:
        return _Entry.model_validate(fields)
    except ValidationError as error:
        raise BrokenError(f"tensor {name:.80}: {explain(error)}") from None


def _require_whole(entries: Mapping[str, _Entry], size: int) -> None:
    """Known types, sizes that fit, no overlap, no hole, nothing behind the last tensor."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _BITS:
            raise BrokenError(f"tensor {name:.80} is of unknown type {entry.dtype!r:.20}")
        start, end = entry.data_offsets
        if start != at:
            raise BrokenError(f"tensor {name:.80} begins at {start}, the one before ends at {at}")
        if prod(entry.shape) * _BITS[entry.dtype] != 8 * (end - start):
            raise BrokenError(
                f"tensor {name:.80} of shape {list(entry.shape)} and type {entry.dtype} has {end - start} bytes"
            )
        at = end
    if at != size:
        raise BrokenError(f"its tensors have {at} bytes, its data {size}")


def damaged(path: Path, reason: object) -> ExportError:
    """An error about a file, in one line."""
    if form := other_form(first_bytes(path)):
        return ExportError(f"{path}: is {form}")
    text = " ".join(str(reason).split())[:200]
    return ExportError(f"{path}: damaged safetensors ({text}); download or save it again")


_PICKLES = (".bin", ".pth", ".pt")
_PICKLED = {"model": "pytorch_model.bin", "adapter_model": "adapter_model.bin"}
"""The pickle that libraries read where there is no safetensors file."""
_MOST_NOTES = 3
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_UNKNOWN_TYPE = re.compile(r"unknown variant `([^`]*)`")
SAVE_AGAIN = "save it again with `save_pretrained`, or give a float checkpoint"


class SafetensorsFiles:
    """`model.safetensors` (or another stem), else the shards that `model.safetensors.index.json` lists.

    As in transformers a single file goes before an index, and the shards say which tensors they hold, not the index.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self._stem = stem
        self._single, self._index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        self._absent: dict[str, Path] = {}
        """Tensors that the index promises and their shards do not hold."""
        self._owner = self._owners()
        self.files = tuple(sorted(set(self._owner.values())))
        self.description = f"safetensors, {len(self._owner)} tensors"

    @property
    def notes(self) -> tuple[str, ...]:
        """Files beside these that are not read, and what the index promises in vain; a line each."""
        others = [self._index] if self._single in self.files else []
        unread = [path.name for path in (*others, self.folder / _PICKLED[self._stem]) if path.is_file()]
        notes = [f"{' and '.join(f.name for f in self.files[:1])} is read, {name} beside it is not" for name in unread]
        return (
            *notes,
            *(f"{self._index.name} promises {name:.80}, which {file.name} does not hold"
              for name, file in sorted(self._absent.items())[:_MOST_NOTES]),
        )  # fmt: skip

    def _owners(self) -> dict[str, Path]:
        """Tensor name → file. Paths that leave the folder are refused."""
        if self._single.is_file():
            return dict.fromkeys(_names_of(self._single), self._single)
        if not self._index.is_file():
            raise self._missing()
        promised = self._weight_map(self._index)
        paths = sorted(set(promised.values()))
        for path in paths:
            if not path.is_file():
                raise missing(path, f", but {self._index.name} names it; download the shard again")
        owners: dict[str, Path] = {}
        for path in paths:
            for name in _names_of(path):
                if name in owners:
                    raise ExportError(f"{path}: tensor {name:.80} is in {owners[name].name} too; save the model again")
                owners[name] = path
        self._absent = {name: path for name, path in promised.items() if name not in owners}
        return owners

    def _missing(self) -> ExportError:
        """Neither a single file nor an index; what is there instead."""
        others = [path.name for path in sorted(self.folder.glob(f"{self._stem}*.safetensors"))]
        if any("-of-" in name for name in others):
            return missing(self._index, f", but shards are there ({others[0]}); download it too")
        if others:
            return missing(self._single, f", but {others[0]} is there; rename it if it is the whole model")
        pickles = any(path.suffix in _PICKLES for path in self.folder.iterdir())
        hint = "pickled weights are never loaded; " if pickles else ""
        if (meta := self.folder / "consolidated.00.pth").is_file():
            hint += f"remove config.json to read {meta.name} with its params.json, or "
        return missing(self._single, f"; {hint}save it as safetensors")

    def _weight_map(self, index_path: Path) -> dict[str, Path]:
        """Tensor name → file, as the index says."""
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ExportError(f"{index_path}: no `weight_map`; the index is damaged, download it again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ExportError(f"{index_path}: {name} points at {file!r}, not at a .safetensors file beside it")
        return {name: self.folder / file for name, file in weight_map.items()}

    @cached_property
    def headers(self) -> Mapping[str, Stored]:
        """Every tensor as its header describes it."""
        files = {path: open_mapped(path) for path in self.files}
        slices = {name: files[path].get_slice(name) for name, path in self._owner.items()}
        return {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.headers.items()}

    @property
    def all_floats(self) -> bool:
        """Whether no tensor is of integers or of 8 bits, as whatever quantized weights are stored in has some."""
        return all(tensor.dtype in _FLOAT_TYPES for tensor in self.headers.values())

    def part(self, name: str, advice: str = SAVE_AGAIN) -> Stored:
        """What the header says of a tensor that must be there. Raises ExportError: it is missing."""
        if name not in self.headers:
            raise ExportError(f"{self.folder}: tensor {name} is missing; {advice}")
        return self.headers[name]

    def matrix(self, name: str, dtypes: tuple[str, ...], advice: str = SAVE_AGAIN) -> Stored:
        """The same of a matrix. Raises ExportError: missing, empty, or of another type or number of dimensions."""
        part = self.part(name, advice)
        if part.dtype not in dtypes or len(part.shape) != 2 or not part.elements:
            reason = f"is {part.dtype} {list(part.shape)}, expected a matrix of {'/'.join(dtypes)}"
            raise self.damaged(name, reason, advice)
        return part

    def damaged(self, name: str, reason: str, advice: str = SAVE_AGAIN) -> ExportError:
        """An error about one tensor."""
        return ExportError(f"{self.file_of(name)}: tensor {name} {reason}; {advice}")

    def file_of(self, name: str) -> Path:
        """Which file a tensor is in."""
        return self._owner[name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored, in memory mapped for it alone: pages stay resident as long as their mapping does."""
        return next(self.tensors([name]))

    def tensors(self, names: Iterable[str]) -> Iterator[torch.Tensor]:
        """Several tensors as stored, in the order of `names`; each file is mapped once."""
        files: dict[Path, Any] = {}
        for name in names:
            path = self._owner[name]
            try:
                files[path] = files.get(path) or open_mapped(path)
                yield files[path].get_tensor(name)
            except (SafetensorError, AttributeError, TypeError, RuntimeError) as error:  # a dtype torch does not have
                raise ExportError(f"{path}: tensor {name} cannot be read ({error})") from None

    def read(self, name: str) -> torch.Tensor:
        tensor = self.tensor(name)
        if tensor.dtype not in FLOATS:
            raise ExportError(f"{self._owner[name]}: tensor {name} is {tensor.dtype}; only float weights are read here")
        values: torch.Tensor = tensor.to(torch.float32, copy=True)
        return values

    def integers(self, name: str) -> None:
        """None: they are floats."""


def _names_of(path: Path) -> list[str]:
    """The tensors of a file, each of them once."""
    names: list[str] = open_mapped(path).keys()
    try:
        loads(raw_header(path))  # of a name that is there twice the library takes the last tensor
    except _BROKEN as error:
        raise damaged(path, error) from None
    return names


def open_mapped(path: Path) -> Any:
    """A safetensors file, its header checked by the library."""
    require_contents(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise damaged(path, _of_no_type(path, str(error)) or error) from None


def _of_no_type(path: Path, error: str) -> str | None:
    """The tensors whose type the library does not know: its own words name the type alone."""
    if (match := _UNKNOWN_TYPE.search(error)) is None:
        return None
    entries = loads(raw_header(path))
    names = [name for name, entry in entries.items() if isinstance(entry, dict) and entry.get("dtype") == match[1]]
    return f"tensor {', '.join(names[:3])} is of unknown type {match[1]!r}"
