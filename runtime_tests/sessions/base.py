"""Tokens, limit, pieces, rewind and cache of every session. Copied to devices: needs only Python 3.9 and numpy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ContextError(ValueError):
    """More tokens than the cache has room for. None of them was fed."""


class TokenError(ValueError):
    """A token id that the model's vocabulary does not have. Nothing of its prompt was fed."""


class CacheError(ValueError):
    """The runtime does not give its cache, or what is to be written is none of it. Nothing was changed."""


class Session(ABC):
    """One loaded artifact with one KV cache; it takes token ids, never text.

    A format's session implements `step`, and `buffers` where its runtime lets the cache be read. Slots from `position`
    on are never read before they are written again, so a rewind only shortens `tokens`.
    """

    measures_speed = True
    """False where the session is a reference for correctness only (Core ML off a Mac)."""
    abreast = 1
    """Windows that `feed_windows` takes at once."""

    def __init__(self, context_length: int, largest_call: int, logits: Literal["last", "all"], vocab_size: int) -> None:
        """Slots of the cache, most tokens of a `step`, positions that it gives logits of, V: from the I/O contract."""
        self.context_length, self.largest_call, self.logits = context_length, largest_call, logits
        self.vocab_size = vocab_size
        self.tokens: list[int] = []
        """In the cache, first to last."""

    @property
    def position(self) -> int:
        """Tokens in the cache, and the slot of the next one."""
        return len(self.tokens)

    @abstractmethod
    def step(self, tokens: Sequence[int], position: int) -> NDArray[np.floating[Any]]:
        """One call of the runtime with 1…largest_call tokens, which are written from slot `position` on.

        Logits [1, V] of the last token or [S, V] of all; the next call may overwrite the array.
        """

    def buffers(self) -> dict[str, NDArray[Any]]:
        """Every buffer of the cache by name, [slots, …] in its own precision (bfloat16 as uint16).

        A view of the runtime's memory where it shares it, else a copy: only `write` changes the cache. Raises
        CacheError: the runtime keeps it to itself.
        """
        raise CacheError("this runtime does not give its KV cache")

    def write(self, first: int, parts: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite the slots from `first` on, of some buffers. Raises CacheError, nothing being changed."""
        buffers = self.buffers()
        for name, part in parts.items():
            buffer = buffers.get(name)
            if buffer is None or (part.dtype, part.shape[1:]) != (buffer.dtype, buffer.shape[1:]):
                raise CacheError(f"the KV cache has no {name} of {part.dtype} {list(part.shape[1:])} a slot")
            if not 0 <= first <= len(buffer) - len(part):
                raise CacheError(f"{name}: slots {first} to {first + len(part)}, the KV cache has {len(buffer)}")
        for name, part in parts.items():
            buffers[name][first : first + len(part)] = part
        self.put_back({name: buffers[name] for name in parts})

    def put_back(self, buffers: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027 – views need nothing
        """Give the runtime what was changed of `buffers`, where they are copies."""

    def close(self) -> None:
        """Free the runtime's memory; the session is unusable afterwards."""
        vars(self).clear()

    def reset(self) -> None:
        """Empty the cache."""
        self.tokens = []

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens that were fed. Raises ContextError: there are fewer."""
        if not 0 <= length <= self.position:
            raise ContextError(f"no rewinding to {length} tokens: the cache holds {self.position}")
        del self.tokens[length:]

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

    def longest(self, _position: int) -> int:
        """Most tokens of a `step` at a position."""
        return self.largest_call

    def ends(self, position: int, end: int) -> Iterator[int]:
        """Where each call ends that feeds the slots position…end-1."""
        while position < end:
            position = min(end, position + self.longest(position))
            yield position

    def _steps(self, tokens: Sequence[int]) -> Iterator[NDArray[np.floating[Any]]]:
        self._require_room(tokens)
        first = self.position
        for end in self.ends(first, first + len(tokens)):
            piece = tokens[self.position - first : end - first]
            logits = self.step(piece, self.position)
            self.tokens.extend(piece)
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
