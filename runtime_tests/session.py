"""A loaded artifact behind one small protocol; each runtime is one module in `sessions/`."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from export.manifest import Manifest


class Session(Protocol):
    """One loaded artifact with one KV cache. Knows token ids, never text."""

    @property
    def measures_speed(self) -> bool:
        """False where the session is a reference for correctness only (Core ML off a Mac)."""

    def reset(self) -> None:
        """Empty the cache."""

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Continue the cache with these tokens (many: prefill, one: decode); logits [V] after the last one.

        More tokens than the contract's `max_prefill` are fed in pieces. Raises ValueError past the context length.
        """

    def feed_each(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Continue the cache; logits [S, V] after every one of these tokens.

        Where the artifact gives the logits of the last position only, that is one call per token.
        """

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens that were fed."""

    def close(self) -> None:
        """Free what the runtime holds."""


class SessionModule(Protocol):
    """A module of `runtime_tests.sessions`."""

    def open_session(self, folder: Path, manifest: Manifest, *, threads: int) -> Session:
        """Load the artifact of a folder."""


def feed_one_by_one(session: Session, tokens: Sequence[int]) -> NDArray[np.float32]:
    """`feed_each` of an artifact that gives the logits of the last position only."""
    return np.stack([session.feed([token]) for token in tokens])


def session_module(manifest: Manifest) -> SessionModule:
    """The module the artifact's own target names; importing it imports its runtime."""
    module = importlib.import_module(f"runtime_tests.sessions.{manifest.plan.target.session}")
    return cast(SessionModule, module)


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> Session:
    """Load an artifact in the runtime its target names."""
    return session_module(manifest).open_session(folder, manifest, threads=threads)
