"""Tokens, limit, pieces, rewind and cache of every session. Copied to devices: needs only Python 3.9 and numpy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.manifest import KVLayout


class ContextError(ValueError):
    """More tokens than the cache has room for. None of them was fed."""


class TokenError(ValueError):
    """A token id that the model's vocabulary does not have. Nothing of its prompt was fed."""


class CacheError(ValueError):
    """The runtime does not give its cache, or what is to be written is none of it. Nothing was changed."""


def leaving(context_length: int, sink: int) -> int:
    """Tokens behind the sink that leave a full context together: the older half of them."""
    return (context_length - sink) // 2


def turned(keys: NDArray[np.float32], frequencies: Sequence[float], first: int, to: int) -> NDArray[np.float32]:
    """Keys [S, …, D] of the positions from `first` on, as RoPE gives them from position `to` on.

    By differences of the angles in its tables, which are float32: far from the start their rounding is not the same.
    """
    places = np.arange(len(keys), dtype=np.float32)[:, None]
    by = np.asarray(frequencies, np.float32)
    angles = ((places + np.float32(to)) * by).astype(np.float64) - ((places + np.float32(first)) * by)
    shape = (len(keys), *[1] * (keys.ndim - 2), len(by))
    cos, sin = (function(angles).astype(np.float32).reshape(shape) for function in (np.cos, np.sin))
    one, other = np.split(keys, 2, axis=-1)
    return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts share before the first difference."""
    return sum(1 for _ in takewhile(bool, map(eq, first, second)))


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
        self.sink: int | None = None
        """First tokens that never leave, where `keep` was told; None: none ever leaves."""
        self.frequencies: Sequence[float] = ()
        self.left: list[int] = []
        """Tokens behind the sink that have left, first to last."""
        self.room, self.window = context_length, context_length
        """Of the cache, and tokens that each one attends to: fewer where `keep` was told of a window."""
        self.prefilled = 0
        """Tokens, from the first on, that are in the cache by the calls of a `prefill`."""
        self.oldest = 0
        """Position of the first token that is in the cache; more than 0 where its window has moved on."""

    def keep(self, kv: KVLayout) -> None:
        """Follow the policy of a contract's cache: where it has a sink, no feed is too long."""
        self.sink, self.frequencies = getattr(kv, "sink", None), getattr(kv, "frequencies", ())
        self.window = getattr(kv, "window", None) or kv.context_length
        self.room = getattr(kv, "slots", None) or kv.context_length

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
        self.tokens, self.left, self.oldest, self.prefilled = [], [], 0, 0

    @property
    def earliest(self) -> int:
        """The shortest length, but for 0, that `rewind` can go back to: more than 0 where tokens have left."""
        if self.oldest:
            return self.oldest + self.window - 1
        return self.sink or 0 if self.left else 0

    def make_room(self) -> None:
        """In a full context the older half of the tokens behind the sink leaves, and the rest moves up.

        Those attend, and are attended to, as if they had always stood at their new positions.
        """
        assert self.sink is not None
        first, count = self.sink, leaving(self.context_length, self.sink)
        behind, parts = slice(first + count, self.position), {}
        for name, slots in self.buffers().items():
            moved = slots[behind]
            parts[name] = (
                turned(moved, self.frequencies, behind.start, first)
                if "key" in name.rpartition(".")[2]
                else moved.copy()
            )
        self.write(first, parts)
        self.left += self.tokens[first : behind.start]
        del self.tokens[first : behind.start]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens in the cache.

        Raises ContextError: there are fewer, or what the next token needs has left.
        """
        if length == 0:
            self.reset()
            return
        if not self.earliest <= length <= self.position:
            raise ContextError(
                f"no rewinding to {length} tokens: the cache holds {self.position}"
                + (f", from {self.earliest} on it is possible" if self.earliest else "")
            )
        del self.tokens[length:]
        self.prefilled = min(self.prefilled, length)

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """What `reset` and `feed` give, by the same calls, without those that the last `prefill` began with as well.

        So what many prompts begin with is computed once. Errors as in `feed`.
        """
        same = common_prefix(self.tokens[: self.prefilled], tokens[:-1]) if not (self.left or self.oldest) else 0
        kept = 0
        while (end := kept + self.longest(kept)) <= same:
            kept = end
        if kept:
            self.rewind(kept)
        else:
            self.reset()
        logits = self.feed(tokens[kept:])
        self.prefilled = len(tokens)
        return logits

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
        start = 0
        while start < len(tokens):
            if self.position == self.context_length:
                self.make_room()
            piece = tokens[start : start + min(self.longest(self.position), self.context_length - self.position)]
            logits = self.step(piece, self.position)
            self.tokens.extend(piece)
            start += len(piece)
            yield logits

    def _require_room(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ValueError("there are no tokens to feed")
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < self.vocab_size:
                raise TokenError(f"token {token}: the vocabulary has {self.vocab_size}")
        if self.sink is None and self.position + len(tokens) > self.context_length:
            raise ContextError(
                f"{len(tokens)} tokens at position {self.position}: the context holds {self.context_length}"
            )
