"""Logits written to a .npy file in parts, so that memory stays small.

A memory map would end the process by SIGBUS, without a message, where the disk is full.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.host import disk

_Write = Callable[[NDArray[np.float32]], object]


@contextmanager
def writing(path: str | Path, shape: tuple[int, ...]) -> Iterator[_Write]:
    """A function that appends numbers to a float32 array, in C order.

    Raises disk.FullError; ValueError where they do not fill the shape.
    """
    with disk.writing(Path(path).parent), Path(path).open("wb") as file:
        start = file.write(_header(shape))
        yield lambda numbers: file.write(np.ascontiguousarray(numbers, dtype="<f4").data)
        if (written := (file.tell() - start) // 4) != prod(shape):
            raise ValueError(f"{path}: {written:,} numbers for the shape {shape}")


def is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file begins and ends as one that was written so; what does not is made again, and never parsed."""
    header = _header(shape)
    if not path.is_file() or path.stat().st_size != len(header) + 4 * prod(shape):
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()
