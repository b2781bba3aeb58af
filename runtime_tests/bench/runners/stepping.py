"""Timing of any session: feed tokens, get logits."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.host.memory import peak_rss_bytes
from runtime_tests.sessions.base import Session
from runtime_tests.sessions.timing import time_prompt, time_tokens

from . import Pass


class SteppingRunner:
    """Clocks around `feed`; choosing the token is not timed."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def prompt(self, tokens: Sequence[int]) -> Pass:
        return Pass(len(tokens), time_prompt(self.session, tokens))

    def generate(self, tokens: Sequence[int], count: int) -> Pass:
        self.session.reset()
        return Pass(count, sum(time_tokens(self.session.feed, self.session.feed(tokens), count)))

    def logits(self, tokens: Sequence[int], prefill: int) -> NDArray[np.float32]:
        self.session.reset()
        rows = [self.session.feed(tokens[:prefill])]
        return np.stack(rows + [self.session.feed([token]) for token in tokens[prefill:]])

    def peak_rss_bytes(self) -> int:
        return peak_rss_bytes()
