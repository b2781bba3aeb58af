"""Bounds of a GGUF header, checked before the `gguf` library walks it. Knows nothing about what the keys mean.

The library trusts the counts in the file: an array said to hold 2⁶⁰ numbers makes it loop until memory is gone.
Format: ggml `docs/gguf.md`; limits as in llama.cpp's `gguf.cpp`, where that has one.
"""

import mmap
import struct
from pathlib import Path

from ..errors import ExportError

MAX_ENTRIES = 2**16
"""Keys, and tensors."""
MAX_ITEMS = 2**22
"""Of all arrays together; Llama 3 has 0.7 million: tokens, their types, merges."""
MAX_DIMENSIONS = 4
BYTES_OF_TYPE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


class BrokenError(Exception):
    """What is wrong with the header."""


def check(path: Path) -> None:
    """Refuse a header whose counts the file cannot hold."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            Header(data).walk()
    except (BrokenError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ExportError(f"{path}: damaged GGUF ({error}); download it again") from None


class Header:
    """A position in the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self.items = 0

    def walk(self) -> None:
        """Magic, version, keys, tensors."""
        if self.data[:4] != b"GGUF":
            raise BrokenError("it does not begin with GGUF")
        self.skip(4)
        version = self.number("I")
        if version not in (2, 3):
            raise BrokenError(f"version {version}; 2 and 3 are read")
        tensors, keys = self.number("Q"), self.number("Q")
        if max(tensors, keys) > MAX_ENTRIES:
            raise BrokenError(f"it says it has {tensors} tensors and {keys} keys; at most {MAX_ENTRIES} are read")
        for _ in range(keys):
            self.string()
            self.value(self.number("I"))
        for _ in range(tensors):
            self.tensor()

    def number(self, kind: str) -> int:
        """One little-endian number."""
        start = self.at
        self.skip(struct.calcsize(kind))
        return int(struct.unpack_from("<" + kind, self.data, start)[0])

    def skip(self, size: int) -> None:
        """Pass over bytes that must be there."""
        self.at += size
        if self.at > len(self.data):
            raise BrokenError(f"its header ends after the file's {len(self.data)} bytes")

    def string(self) -> None:
        """Length, then bytes."""
        self.skip(self.number("Q"))

    def value(self, kind: int) -> None:
        """A key's value of the given type."""
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            self.array(self.number("I"), self.number("Q"))
        elif kind in BYTES_OF_TYPE:
            self.skip(BYTES_OF_TYPE[kind])
        else:
            raise BrokenError(f"a value of unknown type {kind}")

    def array(self, kind: int, count: int) -> None:
        """Items of one type; arrays in arrays are used by nobody."""
        self.items += count
        if self.items > MAX_ITEMS or kind == ARRAY:
            raise BrokenError(f"an array of {count} items of type {kind}")
        for _ in range(count):
            self.value(kind)

    def tensor(self) -> None:
        """Name, dimensions, type, offset."""
        self.string()
        dimensions = self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise BrokenError(f"a tensor of {dimensions} dimensions")
        self.skip(8 * dimensions + 4 + 8)
