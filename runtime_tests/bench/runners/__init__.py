"""How a contender is run and timed: one module per runtime, found by name, imported in the child process only.

Each module has `open_runner(opening)`. Sampling is greedy everywhere.
"""

import importlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ...jobs import Opening


class Pass(NamedTuple):
    """One timed stretch of work."""

    tokens: int
    ns: int


class Runner(Protocol):
    """One loaded artifact."""

    def prompt(self, tokens: Sequence[int]) -> Pass:
        """Time a prompt on an empty cache: tokens in, logits of the last one computed."""

    def generate(self, tokens: Sequence[int], count: int) -> Pass:
        """Time `count` generated tokens after a prompt, which is not timed."""

    def logits(self, tokens: Sequence[int], prefill: int) -> NDArray[np.float32]:
        """Teacher forced: the first `prefill` tokens at once, the others one by one; [tokens - prefill + 1, V]."""

    def peak_rss_bytes(self) -> int:
        """Most memory the process that ran the artifact has held."""


class RunnerModule(Protocol):
    """A module of this package."""

    def open_runner(self, opening: Opening) -> Runner:
        """Load an artifact."""


def module(name: str) -> RunnerModule:
    """The module of that name; importing it imports its runtime."""
    return cast(RunnerModule, importlib.import_module(f"{__name__}.{name}"))
