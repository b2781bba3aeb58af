"""What tasks ask of a session: the likelihood of given continuations, and a greedy answer. Knows ids, never text."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..accuracy import log_softmax
from ..session import Session

PIECE = 256
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
        total, greedy = step(after_context[None], continuation[:1])
        for first in range(0, len(continuation) - 1, PIECE):
            fed = continuation[first : min(first + PIECE, len(continuation) - 1)]
            more, likeliest = step(session.feed_each(fed), continuation[first + 1 : first + 1 + len(fed)])
            total, greedy = total + more, greedy and likeliest
        yield total, greedy


def step(logits: NDArray[np.float32], targets: Sequence[int]) -> tuple[float, bool]:
    """Sum of the log-probabilities of the targets [S] under logits [S, V], and whether each is the likeliest token."""
    ids = np.asarray(targets)
    picked = log_softmax(logits)[np.arange(len(ids)), ids]
    return float(picked.sum()), bool((logits.argmax(axis=-1) == ids).all())


def generate(session: Session, prompt: Sequence[int], most: int, ended: Callable[[Sequence[int]], bool]) -> list[int]:
    """Greedy tokens after a prompt: `most` of them, or up to and with the one after which `ended` holds."""
    session.reset()
    logits = session.feed(prompt)
    tokens = [int(logits.argmax())]
    while len(tokens) < most and not ended(tokens):
        tokens.append(int(session.feed(tokens[-1:]).argmax()))
    return tokens
