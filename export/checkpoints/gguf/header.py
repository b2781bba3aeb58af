"""A GGUF file's header: its counts checked before the library allocates for them, its keys read with their types.

Format: ggml `docs/gguf.md`.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, TypeVar

from gguf import GGMLQuantizationType

from export.checkpoints.files import other_form, require_contents
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
_SHOWN_BYTES = 80
"""Of a name."""
_BYTES_OF_TYPE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


_ANCESTORS = (b"lmgg", b"fmgg", b"tjgg", b"algg")
"""First bytes of llama.cpp's forms before GGUF (GGML, GGMF, GGJT, GGLA as little-endian numbers)."""
_VERSIONS = (2, 3)
_KNOWN_TYPES = frozenset(kind.value for kind in GGMLQuantizationType)
_WITHDRAWN = {4: "Q4_2", 5: "Q4_3"} | dict(zip(range(31, 34), ("Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8"), strict=True)) | {
    36: "IQ4_NL_4_4 (or BitNet's I2_S)", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
"""Numbers that ggml.h no longer gives out; 31 to 38 were orders of Q4_0 and IQ4_NL for one kind of processor."""
_FORK = range(97, 400)
"""Numbers that ik_llama.cpp gives to types of its own."""
_FORK_TYPES = {
    133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K",
    144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT",
    156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT",
}  # fmt: skip
_TAKE = "take the model's file in Q4_0, Q4_K_M, Q8_0 or F16"


class BrokenError(Exception):
    """What is wrong with the header."""


class OtherError(Exception):
    """What the file is instead of one that is read, and what to do; it is not damaged."""


def _foreign(kind: int) -> str:
    """What an element type is that the library does not know."""
    if kind in _WITHDRAWN:
        return f"{kind}, {_WITHDRAWN[kind]}, which llama.cpp has withdrawn"
    if kind in _FORK:
        return f"{kind}, {_FORK_TYPES.get(kind, 'a type')} of ik_llama.cpp, which llama.cpp does not have"
    return f"{kind}, which is none of llama.cpp's"


def check(path: Path) -> None:
    """Refuse a header whose counts the file cannot hold."""
    require_contents(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).walk()
    except OtherError as error:
        raise ExportError(f"{path}: {error}") from None
    except (BrokenError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ExportError(f"{path}: damaged GGUF ({error}); download it again") from None


class _Header:
    """A position in the file; each method passes over what it is named after."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self.items = 0

    def walk(self) -> None:
        if (first := self.data[:4]) != b"GGUF":
            if first in _ANCESTORS:
                raise OtherError(f"a file of llama.cpp's form before GGUF; {_TAKE}")
            if form := other_form(first):
                raise OtherError(f"is {form}")
            raise BrokenError("it does not begin with GGUF")
        self.skip(4)
        version = self.number("I")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise OtherError("a big-endian GGUF; convert it with `gguf-convert-endian FILE little`")
        if version not in _VERSIONS:
            age = "an older" if version < min(_VERSIONS) else "a newer"
            raise OtherError(
                f"version {version}, {age} form of GGUF than {min(_VERSIONS)} and {max(_VERSIONS)}; {_TAKE}"
            )
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

    def string(self) -> str:
        """The text, as far as it is for people."""
        size = self.number("Q")
        start = self.at
        self.skip(size)
        return self.data[start : start + min(size, _SHOWN_BYTES)].decode("utf-8", "replace")

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
        name, dimensions = self.string(), self.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise BrokenError(f"a tensor of {dimensions} dimensions")
        self.skip(8 * dimensions)
        if (kind := self.number("I")) not in _KNOWN_TYPES:
            raise OtherError(f"tensor {name!r} is of type {_foreign(kind)}; {_TAKE}")
        self.skip(8)  # offset
