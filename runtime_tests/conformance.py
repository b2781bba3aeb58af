"""What every session must do at the edges of its cache: the last position, past it, after a reset and a rewind."""

import numpy as np

from .session import Session

PROBE = 16
REWIND_LIMIT = 1e-2


def check(session: Session, context_length: int, *, fill: bool) -> list[str]:
    """Every promise that is broken, in words; an empty list is a pass. `fill`: the last position too."""
    failures = reset_failures(session) + rewind_failures(session)
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


def rewind_failures(session: Session) -> list[str]:
    """After a rewind a token gives the logits it gave before, and `feed_each` those of feeding one by one."""
    context, more = list(range(1, PROBE + 1)), list(range(PROBE + 1, PROBE + 9))
    session.reset()
    session.feed(context)
    first = np.stack([session.feed([token]) for token in more])
    session.rewind(PROBE)
    session.feed(more[::-1])
    session.rewind(PROBE)
    again = session.feed_each(more)
    # many rows at once take other kernels than one row; what quantizes activations then rounds otherwise
    difference = float(np.linalg.norm(first - again) / np.linalg.norm(first))
    return [] if difference <= REWIND_LIMIT else [f"after a rewind the logits differ by {difference:.1e} of their norm"]


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
