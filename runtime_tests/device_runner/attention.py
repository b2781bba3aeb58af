"""The runner's attention kernels by themselves, for tests and times.

python -m runtime_tests.device_runner.attention        milliseconds of one call, float32, bfloat16 and int8 in turn
"""

import ctypes
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from export.build.command import run
from export.host.console import say

from . import build

_SHAPES = ((32, 8, 64), (9, 3, 64))
"""H, G, D of Llama 3.2 1B and SmolLM2-135M."""
_POSITIONS = (63, 511, 2000, 8000)
_RUNS = 20
KINDS = {"attend": "float32", "attend_bfloat16": "bfloat16", "attend_int8": "int8"}
"""Function of the library → numbers of its cache."""
_SHAPE = (*((name, ctypes.c_int64) for name in ("new_tokens", "heads", "groups", "head_dim", "start", "positions")),)
_MASK, _SCALE = ("mask", ctypes.c_void_p), ("scale", ctypes.c_float)

Heads = tuple[NDArray[np.int8], NDArray[np.int8], NDArray[np.float32]]
"""int8 [N, H, D], zeros int8 and scales float32 [N, H]."""


class Attention(ctypes.Structure):
    """A call over a cache of float32, or of bfloat16 as `bfloat16` gives it."""

    _fields_ = (*_SHAPE, _MASK, _SCALE, *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")))


class Int8Heads(ctypes.Structure):
    """An int8 tensor with its zeros and scales."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("values", "zeros", "scales")),)


class Int8Attention(ctypes.Structure):
    """A call with int8 operands."""

    _fields_ = (
        *_SHAPE,
        _MASK,
        _SCALE,
        *((name, Int8Heads) for name in ("query", "key", "value")),
        ("out", ctypes.c_void_p),
    )


def library(path: Path) -> Any:
    """The kernels that `build.kernels_library` made."""
    loaded = ctypes.CDLL(str(path))
    for name in KINDS:
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to the nearest even one."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _operands(heads: int, groups: int, dim: int, start: int) -> tuple[list[NDArray[np.float32]], list[Heads]]:
    """Of one new token: random numbers, and integers."""
    rng = np.random.default_rng(0)
    sizes = ((1, heads, dim), (start + 1, groups, dim), (start + 1, groups, dim))
    integers = [
        (
            rng.integers(-128, 128, size, np.int8),
            rng.integers(-30, 30, size[:2], np.int8),
            rng.uniform(0.01, 0.03, size[:2]).astype(np.float32),
        )
        for size in sizes
    ]
    return [rng.standard_normal(size, np.float32) for size in sizes], integers


def _times(kernels: Any, shape: tuple[int, int, int], start: int, threads: int) -> Iterator[float]:
    """Median milliseconds of a call of each kind. A cache of its own for each of several layers, as in a model."""
    heads, groups, dim = shape
    layers = [_operands(*shape, start) for _ in range(4)]
    out = np.empty((1, heads, dim), np.float32)
    halves: list[list[NDArray[Any]]] = [[query, *map(bfloat16, cache)] for (query, *cache), _ in layers]
    spent: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(_RUNS):
        for name, taken in spent.items():
            nanoseconds = 0
            for (floats, integers), half in zip(layers, halves, strict=True):
                head = (1, heads, groups, dim, start, start + 1, None, dim**-0.5)
                if name != "attend_int8":
                    arrays = half if name == "attend_bfloat16" else floats
                    call: ctypes.Structure = Attention(*head, *(x.ctypes.data for x in arrays), out.ctypes.data)
                else:
                    parts = [Int8Heads(*(part.ctypes.data for part in operand)) for operand in integers]
                    call = Int8Attention(*head, *parts, out.ctypes.data)
                nanoseconds += getattr(kernels, name)(ctypes.byref(call), kernels.best_isa(), threads, 2) / 2
            taken.append(nanoseconds / len(layers) / 1e6)
    return map(statistics.median, spent.values())


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Time one new token at several positions."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = library(build.kernels_library(Path(folder)))
        for shape in _SHAPES:
            for start in _POSITIONS:
                for threads in (1, 2):
                    times = dict(zip(KINDS.values(), _times(kernels, shape, start, threads), strict=True))
                    told = [f"{kind} {ms:.4f} ms, {times['float32'] / ms:.2f} times" for kind, ms in times.items()]
                    h, g, d = shape
                    say(f"H {h} G {g} D {d}, position {start}, {threads} threads: {'; '.join(told)}")


if __name__ == "__main__":
    sys.exit(run(app))
