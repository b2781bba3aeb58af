"""Logits written to a .npy file piece by piece, so that memory stays small. Knows nothing about formats.

Not through a memory map: where the disk is full, that ends a process without a word (SIGBUS).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export import disk

Write = Callable[[NDArray[np.float32]], object]


@contextmanager
def writing(path: str | Path, shape: tuple[int, ...]) -> Iterator[Write]:
    """Give a function that appends numbers to a float32 array, in C order.

    Raises disk.FullError; ValueError where the numbers do not fill the shape.
    """
    with disk.writing(Path(path).parent), Path(path).open("wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        start = file.tell()
        yield lambda numbers: file.write(np.ascontiguousarray(numbers, dtype="<f4").data)
        if (written := (file.tell() - start) // 4) != prod(shape):
            raise ValueError(f"{path}: {written:,} numbers for the shape {shape}")
