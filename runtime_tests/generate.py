"""Greedy generation through a session. Knows token ids, never text."""

from collections.abc import Sequence
from itertools import takewhile

from .session import Session


def greedy(session: Session, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` most likely tokens after a prompt, one after the other."""
    session.reset()
    logits = session.feed(prompt)
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(session.feed([tokens[-1]]).argmax()))
    return tokens


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common before they part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
