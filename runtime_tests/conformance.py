"""What every session must do at the edges of its cache: the last position, past it, and after a reset."""

import numpy as np

from .session import Session

PROBE = 16


def check(session: Session, context_length: int, *, fill: bool) -> list[str]:
    """Every promise that is broken, in words; an empty list is a pass. `fill`: the last position too."""
    failures = reset_failures(session)
    failures += limit_failures(session, context_length) if fill else []
    session.close()
    return failures


def reset_failures(session: Session) -> list[str]:
    """After a reset the same tokens give the same logits: nothing of the last conversation is left in the cache."""
    session.reset()
    first = session.feed(list(range(1, PROBE + 1))).copy()
    session.feed(list(range(PROBE + 1, 2 * PROBE)))
    session.reset()
    again = session.feed(list(range(1, PROBE + 1)))
    difference = float(np.abs(first - again).max() / np.abs(first).max())
    return [] if difference <= 1e-4 else [f"after a reset the logits differ by {difference:.1e} of the largest"]


def limit_failures(session: Session, context_length: int) -> list[str]:
    """Position context_length-1 can be fed; the one after it raises ValueError rather than overwrite the cache."""
    session.reset()
    session.feed([1 + i % PROBE for i in range(context_length - 1)])
    if not np.isfinite(session.feed([1])).all():
        return [f"logits at the last position, {context_length - 1}, are not finite"]
    try:
        session.feed([1])
    except ValueError:
        return []
    return [f"a token past the context of {context_length} was accepted"]
