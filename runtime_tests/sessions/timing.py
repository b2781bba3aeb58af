"""Clocks around a session's calls. Imports nothing heavy: the memory of a process that is timed is measured too."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Session

_Feed = Callable[[Sequence[int]], NDArray[np.floating[Any]]]


def elapsed_ns(work: Callable[[], object]) -> int:
    """Nanoseconds of one call."""
    started = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - started


def time_prompt(session: Session, tokens: Sequence[int]) -> int:
    """Nanoseconds from tokens to logits, on an empty cache."""
    session.reset()
    return elapsed_ns(lambda: session.feed(tokens))


def time_tokens(feed: _Feed, logits: NDArray[np.floating[Any]], count: int) -> Iterator[int]:
    """Nanoseconds of feeding each of `count` greedy tokens after these logits [V]; choosing the token is not timed."""
    for _ in range(count):
        token = int(logits.argmax())
        started = time.perf_counter_ns()
        logits = feed([token])
        yield time.perf_counter_ns() - started
