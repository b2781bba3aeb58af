"""Sums and loops over many tokens or rows, on all cores, whose results do not depend on how many cores there are.

Work is cut into pieces by its size alone. Each piece is computed by one thread, and sums over pieces are taken in their
order. (torch's own threads split one sum among them, and wait for each other in every small operation.)
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from export.host import processor

T = TypeVar("T")
R = TypeVar("R")
_TOKENS = 4096
"""Tokens that are multiplied at once."""
_ROWS = 256
"""Rows of a product, or of a weight, that one thread computes, at most."""


def spread(function: Callable[[T], R], pieces: Iterable[T], device: str = "cpu", workers: int | None = None) -> list[R]:
    """The function of every piece, in their order; on a GPU, which is parallel in itself, one after another.

    `workers`: threads at most, by default and never more than one for each processor. The caller's is one of them, so a
    piece may itself be spread. The first exception ends it; pieces not begun are left.
    """
    if device != "cpu":
        return [function(piece) for piece in pieces]
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    left, taking, results = enumerate(pieces), threading.Lock(), dict[int, R]()

    def taken() -> tuple[int, T] | None:
        with taking:
            return next(left, None)

    def work() -> None:
        nonlocal left
        torch.set_num_threads(1)  # else MKL takes as many threads in each of ours as there are cores
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):  # both modes belong to threads
            try:
                while numbered := taken():
                    results[numbered[0]] = function(numbered[1])
            except BaseException:
                left = enumerate(())
                raise

    helpers: list[Future[None]] = []
    with one_torch_thread():
        try:
            helpers += (_helpers(os.getpid()).submit(work) for _ in range((workers or _processors()) - 1))
            work()
        finally:
            left = enumerate(())  # one that is cancelled may wait long for a thread, and would keep the pieces alive
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        for helper in begun:
            helper.result()
    in_order = [results[i] for i in range(len(results))]
    results.clear()
    return in_order


@cache
def _processors() -> int:
    return processor.usable()


@cache
def _helpers(_process: int) -> ThreadPoolExecutor:
    """Threads that wait for work; those of a process are not in its forks."""
    return ThreadPoolExecutor(max(1, _processors() - 1), "spread")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Threads of our own instead of torch's: theirs wait for each other in every small operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Where `dtype` is bfloat16, oneDNN multiplies float32 matrices on the CPU, rounded to bfloat16 if that is faster.

    It is faster with AMX. Without it oneDNN computes in float32, more than twice as fast as MKL does on AMD. Sums are
    float32 in any case, so of numbers that are bfloat16 it is the exact product. It holds for all threads.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        settings.fp32_precision = before


def exact_products(dtype: torch.dtype) -> AbstractContextManager[None]:
    """The same, where nothing is rounded."""
    return products_in(torch.float32 if torch.cpu._is_amx_tile_supported() else dtype)


def blocks(size: int, most: int = _ROWS) -> list[slice]:
    """0 … size cut into parts of about one length, each of at most `most`; an even number, for two cores."""
    count = -(-size // most)
    count += 1 < count < size and count % 2
    edges = [size * i // count for i in range(count + 1)]
    return [slice(*edge) for edge in pairwise(edges)]


def second_moments(x: Tensor) -> Tensor:
    """x [T, K] → Σ x xᵀ float32 [K, K]. Its upper half is computed, the lower one copied.

    Products are exact and summed in float32: rounded more coarsely it has no inverse where channels go together.
    """
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)

    def add(columns: Tensor, rows: slice) -> None:
        total[rows, rows.start :].addmm_(columns[:, rows].T, columns[:, rows.start :])

    room = total.new_empty(min(len(x), _TOKENS), x.shape[1])
    with products_in(x.dtype):
        for part in torch.split(x, _TOKENS):
            spread(partial(add, room[: len(part)].copy_(part)), blocks(x.shape[1], _ROWS // 2), x.device.type)
    return total.triu_() + total.triu(1).T


def crossed_moments(y: Tensor, x: Tensor) -> Tensor:
    """y [T, N], x [T, K] of one dtype, which some tokens are summed in → Σ y xᵀ float32 [N, K]."""
    total = torch.zeros(y.shape[1], x.shape[1], device=x.device)

    def add(rows: slice) -> None:
        for left, right in zip(torch.split(y, _TOKENS), torch.split(x, _TOKENS), strict=True):
            total[rows] += left[:, rows].T @ right

    spread(add, blocks(y.shape[1]), x.device.type)
    return total


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K] @ b [K, M], float32."""
    return by_rows(lambda rows: rows @ b, a)


def by_rows(function: Callable[..., Tensor], *tensors: Tensor, at_once: int = _ROWS) -> Tensor:
    """A function of the same rows of some tensors, whose results are put one below the other."""
    pieces = ([tensor[rows] for tensor in tensors] for rows in blocks(len(tensors[0]), at_once))
    return torch.cat(spread(lambda piece: function(*piece), pieces, tensors[0].device.type))
