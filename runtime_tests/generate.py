"""Greedy generation through a session. Knows token ids, never text."""

from collections.abc import Sequence

from .session import Session


def greedy(session: Session, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` most likely tokens after a prompt, one after the other."""
    session.reset()
    logits = session.feed(prompt)
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(session.feed([tokens[-1]]).argmax()))
    return tokens
