"""Position, limit, pieces and rewind of every session. Copied to devices: needs only Python 3.9 and numpy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ContextError(ValueError):
    """More tokens than the cache has room for. None of them was fed."""


class TokenError(ValueError):
    """A token id that the model's vocabulary does not have. Nothing of its prompt was fed."""


class Session(ABC):
    """One loaded artifact with one KV cache; it takes token ids, never text.

    A format's session implements `step`. Slots from `position` on are never read before they are written again, so a
    rewind only moves `position`.
    """

    measures_speed = True
    """False where the session is a reference for correctness only (Core ML off a Mac)."""
    abreast = 1
    """Windows that `feed_windows` takes at once."""

    def __init__(self, context_length: int, largest_call: int, logits: Literal["last", "all"], vocab_size: int) -> None:
        """Slots of the cache, most tokens of a `step`, positions that it gives logits of, V: from the I/O contract."""
        self.context_length, self.largest_call, self.logits = context_length, largest_call, logits
        self.vocab_size = vocab_size
        self.position = 0
        """Tokens in the cache."""

    @abstractmethod
    def step(self, tokens: Sequence[int], position: int) -> NDArray[np.floating[Any]]:
        """One call of the runtime with 1…largest_call tokens, which are written from slot `position` on.

        Logits [1, V] of the last token or [S, V] of all; the next call may overwrite the array.
        """

    def close(self) -> None:
        """Free the runtime's memory; the session is unusable afterwards."""
        vars(self).clear()

    def reset(self) -> None:
        """Empty the cache."""
        self.position = 0

    @property
    def earliest(self) -> int:
        """The shortest length, but for 0, that `rewind` can go back to: where a window moves, tokens have left."""
        return 0

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens that were fed. Raises ContextError: they are not there any more."""
        if length < self.earliest:
            raise ContextError(f"back to {length} tokens: the window has moved; from {self.earliest} on it is possible")
        self.position = length

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to the cache (many: prefill, one: decode); float32 logits [V] after the last one.

        Raises TokenError where the vocabulary lacks one, ContextError where they do not fit, ValueError where there are
        none. Some runtimes would answer an unknown id with a row of zeros.
        """
        for logits in self._steps(tokens):
            last: NDArray[np.floating[Any]] = logits[-1]
        return last.astype(np.float32)

    def feed_each(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to the cache; float32 logits [S, V] after each of them. Errors as in `feed`.

        Where the artifact gives logits of the last position only, that is one call per token.
        """
        if self.logits == "last":
            return np.stack([self.feed([token]) for token in tokens])
        return np.concatenate([logits.astype(np.float32) for logits in self._steps(tokens)])

    def feed_windows(self, windows: Sequence[Sequence[int]], prefill: int) -> Iterator[NDArray[np.float32]]:
        """Logits [W, V] after the prefill of up to `abreast` windows of equal length, and after each token behind it.

        The last token of a window is not fed. Errors as in `feed`.
        """
        (window,) = windows
        self.reset()
        yield self.feed(window[:prefill])[None]
        for token in window[prefill:-1]:
            yield self.feed([token])[None]

    def _steps(self, tokens: Sequence[int]) -> Iterator[NDArray[np.floating[Any]]]:
        self._require_room(tokens)
        for start in range(0, len(tokens), self.largest_call):
            piece = tokens[start : start + self.largest_call]
            logits = self.step(piece, self.position)
            self.position += len(piece)
            yield logits

    def _require_room(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ValueError("there are no tokens to feed")
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < self.vocab_size:
                raise TokenError(f"token {token}: the vocabulary has {self.vocab_size}")
        if self.position + len(tokens) > self.context_length:
            raise ContextError(
                f"{len(tokens)} tokens at position {self.position}: the context holds {self.context_length}"
            )
