"""Timing of anything that is stepped as a Session: feed tokens, get logits. Knows nothing about formats."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from export.memory import peak_rss_bytes

from . import Pass


class Steps(Protocol):
    """The part of `Session` that timing needs."""

    def reset(self) -> None:
        """Empty the cache."""

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Continue the cache; logits [V] after the last token."""


class SteppingRunner:
    """Clocks around `feed`; choosing the token is not timed, as in `runtime_tests.latency`."""

    def __init__(self, session: Steps) -> None:
        self.session = session

    def prompt(self, tokens: Sequence[int]) -> Pass:
        self.session.reset()
        return Pass(len(tokens), clock(lambda: self.session.feed(tokens)))

    def generate(self, tokens: Sequence[int], count: int) -> Pass:
        self.session.reset()
        logits, total = self.session.feed(tokens), 0
        for _ in range(count):
            token = int(logits.argmax())
            started = time.perf_counter_ns()
            logits = self.session.feed([token])
            total += time.perf_counter_ns() - started
        return Pass(count, total)

    def logits(self, tokens: Sequence[int], prefill: int) -> NDArray[np.float32]:
        self.session.reset()
        rows = [self.session.feed(tokens[:prefill])]
        return np.stack(rows + [self.session.feed([token]) for token in tokens[prefill:]])

    def peak_rss_bytes(self) -> int:
        return peak_rss_bytes()


def clock(work: Callable[[], object]) -> int:
    """Nanoseconds of one call."""
    started = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - started
