"""A GGUF file's header: its counts checked before the library allocates for them, its keys read with their types.

Format: ggml `docs/gguf.md`.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, TypeVar

from export.checkpoints.files import require_contents
from export.errors import ExportError

Value = TypeVar("Value", int, float, str, bool)


class Metadata:
    """The keys of one opened file. A missing or wrong value is an ExportError that names its key."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self._reader = reader

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """One value; without a default the key must be there."""
        value = self._contents(key)
        if value is None and default is not None:
            return default
        checked: Value = self._require(key, value, kind)
        return checked

    def array(self, key: str, kind: type[Value]) -> list[Value]:
        """A list whose items are all of one type."""
        return [self._require(key, item, kind) for item in self._require(key, self._contents(key), list)]

    def _contents(self, key: str) -> Any:
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError) as error:  # not UTF-8; no items
            raise ExportError(f"{self.path}: metadata key {key} is damaged ({error})") from None

    def _require(self, key: str, value: Any, kind: type) -> Any:
        if value is None:
            raise ExportError(f"{self.path}: metadata key {key} is missing")
        if type(value) is not kind:
            raise ExportError(f"{self.path}: metadata key {key} is {value!r:.60}, expected {kind.__name__}")
        return value


_MAX_ENTRIES = 2**16
"""Keys, and tensors."""
MAX_ITEMS = 2**22
"""In all arrays together; Llama 3 has 0.7 million: tokens, their types, merges."""
_MAX_DIMENSIONS = 4
_BYTES_OF_TYPE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class BrokenError(Exception):
    """What is wrong with the header."""


def check(path: Path) -> None:
    """Refuse a header whose counts the file cannot hold."""
    require_contents(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).walk()
    except (BrokenError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ExportError(f"{path}: damaged GGUF ({error}); download it again") from None


class _Header:
    """A position in the file; each method passes over what it is named after."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self.items = 0

    def walk(self) -> None:
        if self.data[:4] != b"GGUF":
            raise BrokenError("it does not begin with GGUF")
        self.skip(4)
        version = self.number("I")
        if version not in (2, 3):
            raise BrokenError(f"version {version}; 2 and 3 are read")
        tensors, keys = self.number("Q"), self.number("Q")
        if max(tensors, keys) > _MAX_ENTRIES:
            raise BrokenError(f"it says it has {tensors} tensors and {keys} keys; at most {_MAX_ENTRIES} are read")
        for _ in range(keys):
            self.string()
            self.value(self.number("I"))
        for _ in range(tensors):
            self.tensor()

    def number(self, kind: str) -> int:
        """Little-endian; `kind` as in `struct`."""
        start = self.at
        self.skip(struct.calcsize(kind))
        return int(struct.unpack_from("<" + kind, self.data, start)[0])

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise BrokenError(f"its header ends after the file's {len(self.data)} bytes")

    def string(self) -> None:
        self.skip(self.number("Q"))

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            self.array(self.number("I"), self.number("Q"))
        elif kind in _BYTES_OF_TYPE:
            self.skip(_BYTES_OF_TYPE[kind])
        else:
            raise BrokenError(f"a value of unknown type {kind}")

    def array(self, kind: int, count: int) -> None:
        """Items of one type, which is not an array again: no writer nests them."""
        self.items += count
        if self.items > MAX_ITEMS or kind == _ARRAY:
            raise BrokenError(f"an array of {count} items of type {kind}")
        for _ in range(count):
            self.value(kind)

    def tensor(self) -> None:
        self.string()
        dimensions = self.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise BrokenError(f"a tensor of {dimensions} dimensions")
        self.skip(8 * dimensions + 4 + 8)  # sizes, type, offset
