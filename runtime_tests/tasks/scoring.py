"""Scores of continuations by a session, and the limits of generated answers. Token ids only, never text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from numpy.typing import NDArray

from export.errors import ExportError
from runtime_tests.checks.accuracy import log_softmax
from runtime_tests.sessions.base import Session

_ROWS = 256
"""Most tokens whose logits are held at once: 256 × 128,256 of them are 131 MB."""
CERTAIN = (0.0, True)
"""The score of an empty continuation."""


def score(
    session: Session, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> Iterator[tuple[float, bool]]:
    """log P(continuation | context) in nats, and whether it is the greedy answer, for each continuation.

    The context is fed once. Every continuation starts from the same cache, so its score does not depend on the
    others'. The last token of a continuation is never fed.
    """
    session.reset()
    after_context = session.feed(context)
    for continuation in continuations:
        if not continuation:
            yield CERTAIN
            continue
        session.rewind(len(context))
        total, greedy = _step(after_context[None], continuation[:1])
        for first in range(0, len(continuation) - 1, _ROWS):
            fed = continuation[first : min(first + _ROWS, len(continuation) - 1)]
            more, likeliest = _step(session.feed_each(fed), continuation[first + 1 : first + 1 + len(fed)])
            total, greedy = total + more, greedy and likeliest
        yield total, greedy


def _step(logits: NDArray[np.float32], targets: Sequence[int]) -> tuple[float, bool]:
    """Sum of the log-probabilities of the targets [S] under logits [S, V], and whether each is the likeliest token."""
    ids = np.asarray(targets)
    picked = log_softmax(logits)[np.arange(len(ids)), ids]
    return float(picked.sum()), bool((logits.argmax(axis=-1) == ids).all())


_MAX_GEN_TOKS = 256
"""New tokens where a task sets no limit, as in lm-evaluation-harness's HFLM."""
_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


@dataclass(frozen=True)
class _Generation:
    until: tuple[str, ...]
    """Stop strings, not part of the answer."""
    most: int
    """New tokens."""
    room: int
    """Tokens left for the prompt."""


def read(generation_kwargs: Mapping[str, Any], context_length: int) -> _Generation:
    """A task's generation_kwargs. Raises ExportError: sampling, beams, or answers as long as the context."""
    kwargs = normalize_gen_kwargs(dict(generation_kwargs), _MAX_GEN_TOKS)
    if kwargs["do_sample"] or (unknown := sorted(kwargs.keys() - _GREEDY)):
        refused = "sampling" if kwargs["do_sample"] else ", ".join(unknown)
        raise ExportError(f"generation_kwargs ask for {refused}; artifacts decode greedily, choose another task")
    most = int(kwargs["max_gen_toks"])
    if most >= context_length:
        raise ExportError(f"{most} new tokens leave no room for a prompt in a context of {context_length}")
    until = tuple(stop for stop in handle_stop_sequences(kwargs["until"], eos=None) if stop)
    return _Generation(until, most, context_length - most)
