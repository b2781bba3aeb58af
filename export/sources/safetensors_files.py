"""Tensors of a folder's safetensors, one file or sharded, memory-mapped. Never unpickles; knows no model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ExportError
from . import safetensors_header, unique_json

PICKLES = (".bin", ".pth", ".pt")
MAX_JSON_BYTES = 2**24
"""Of a configuration or an index; the index of 405B takes 0.1 MB."""
FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
BYTES_OF = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1}
"""Of the element types that weights come in, by the header's names."""


@dataclass(frozen=True)
class Stored:
    """What a header says of one tensor."""

    dtype: str
    """As safetensors writes it: `BF16`, `U8` …"""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int | None:
        """None for a type that no weight comes in."""
        size = BYTES_OF.get(self.dtype)
        return None if size is None else size * self.elements


class SafetensorsFiles:
    """`model.safetensors` (or another stem) or the shards that `model.safetensors.index.json` lists."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self._stem = stem
        self._owner = self._index()
        self.files = tuple(sorted(set(self._owner.values())))
        self.description = f"safetensors, {len(self._owner)} tensors"

    def _index(self) -> dict[str, Path]:
        """Tensor name → file. Paths that leave the folder are refused."""
        index_path = self.folder / f"{self._stem}.safetensors.index.json"
        if not index_path.is_file():
            single = self.folder / f"{self._stem}.safetensors"
            if not single.is_file():
                pickles = any(path.suffix in PICKLES for path in self.folder.iterdir())
                hint = "pickled weights are never loaded; " if pickles else ""
                raise ExportError(f"{single}: missing; {hint}save it as safetensors")
            return dict.fromkeys(names_of(single), single)
        owner = self._weight_map(index_path)
        paths = sorted(set(owner.values()))
        for path in paths:
            if not path.is_file():
                raise ExportError(f"{path}: missing, but {index_path.name} names it; download the shard again")
        for path in paths:
            present = set(names_of(path))
            listed = {name for name, file in owner.items() if file == path}
            if present != listed:
                names = ", ".join(sorted(present ^ listed)[:3])
                raise ExportError(f"{path}: its tensors differ from {index_path.name}: {names}; download it again")
        return owner

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
    def stored(self) -> Mapping[str, Stored]:
        """Every tensor as its header describes it."""
        files = {path: open_mapped(path) for path in self.files}
        slices = {name: files[path].get_slice(name) for name, path in self._owner.items()}
        return {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As in `Source`."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    def file_of(self, name: str) -> Path:
        """Which file a tensor is in, for messages."""
        return self._owner[name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored, in mapped memory; mapped anew, for what was read stays as long as its mapping."""
        return next(self.tensors([name]))

    def tensors(self, names: Iterable[str]) -> Iterator[torch.Tensor]:
        """Several tensors as stored, in the order asked; each file is mapped once."""
        files: dict[Path, Any] = {}
        for name in names:
            path = self._owner[name]
            try:
                files[path] = files.get(path) or open_mapped(path)
                yield files[path].get_tensor(name)
            except (SafetensorError, AttributeError, TypeError, RuntimeError) as error:  # a dtype torch does not have
                raise ExportError(f"{path}: tensor {name} cannot be read ({error})") from None

    def read(self, name: str) -> torch.Tensor:
        """As in `Source`."""
        tensor = self.tensor(name)
        if tensor.dtype not in FLOATS:
            raise ExportError(f"{self._owner[name]}: tensor {name} is {tensor.dtype}; only float weights are read here")
        values: torch.Tensor = tensor.to(torch.float32, copy=True)
        return values

    def integers(self, name: str) -> None:
        """As in `Source`: floats."""


def names_of(path: Path) -> list[str]:
    """The tensors of a file, each of them once."""
    names: list[str] = open_mapped(path).keys()
    safetensors_header.refuse_repeated(path)
    return names


def open_mapped(path: Path) -> Any:
    """A safetensors file, its header checked by the library."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path}: damaged safetensors ({error}); download or save it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear line."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ExportError(f"{path}: larger than {MAX_JSON_BYTES} bytes, which no such file is")
        value = unique_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
