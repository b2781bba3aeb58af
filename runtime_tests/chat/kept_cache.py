"""A session whose KV cache is kept from one prompt to the next. Knows token ids, never text."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..generate import common_prefix
from ..session import Session

PIECE = 128
"""Tokens fed between two looks at Ctrl-C while a prompt is read."""


class KeptCache:
    """The tokens that the cache holds, and what must be fed to get from them to the next prompt's."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokens: list[int] = []
        """Fed so far, first to last."""

    def share(self, prompt: Sequence[int]) -> int:
        """Rewind to what cache and prompt have in common; how many tokens that is.

        The prompt's last token is always left to be fed: the logits after it are what is asked for.
        """
        shared = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        if shared == 0:
            self.session.reset()
        elif shared < len(self.tokens):
            self.session.rewind(shared)
        del self.tokens[shared:]
        return shared

    def feed(self, tokens: Sequence[int], stopped: Callable[[], bool]) -> NDArray[np.float32] | None:
        """Continue the cache; logits [V] after the last token, or None when stopped before that."""
        logits = None
        for start in range(0, len(tokens), PIECE):
            if stopped():
                return None
            piece = tokens[start : start + PIECE]
            logits = self.session.feed(piece)
            self.tokens.extend(piece)
        return logits
