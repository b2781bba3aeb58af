"""Any session of `runtime_tests.sessions`, timed step by step; opened here for one of our artifact folders."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export import manifest
from runtime_tests.jobs import Opening
from runtime_tests.sessions import Session, open_session
from runtime_tests.sessions.timing import time_prompt, time_tokens

from . import DROPPED, Pass, Runner


class SessionRunner(Runner):
    """Clocks around `feed`; choosing the token is not timed."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def prompt(self, tokens: Sequence[int]) -> Pass:
        return Pass(len(tokens), time_prompt(self.session, tokens))

    def generate(self, tokens: Sequence[int], count: int) -> Pass:
        self.session.reset()
        return Pass(count, sum(time_tokens(self.session.feed, self.session.feed(tokens), count)))

    def occupy(self, position: int) -> None:
        """Write any numbers to the whole cache, and go on as after `position` tokens."""
        for buffer in self.session.buffers().values():
            buffer[...] = 1
        self.session.tokens = [0] * position

    def decode_at(self, positions: Sequence[int], count: int) -> list[list[int]]:
        lists = []
        for position in positions:
            self.occupy(position)
            times = time_tokens(self.session.feed, self.session.feed([0]), DROPPED - 1 + count)
            lists.append(list(times)[DROPPED - 1 :])
        return lists

    def logits(self, tokens: Sequence[int], prefill: int) -> NDArray[np.float32]:
        self.session.reset()
        rows = [self.session.feed(tokens[:prefill])]
        return np.stack(rows + [self.session.feed([token]) for token in tokens[prefill:]])

    def windows(self, tokens: Sequence[Sequence[int]], prefill: int) -> Iterator[NDArray[np.float32]]:
        """As many side by side as the session takes."""
        for first in range(0, len(tokens), self.session.abreast):
            rows = list(self.session.feed_windows(tokens[first : first + self.session.abreast], prefill))
            for window in range(len(rows[0])):
                yield np.stack([row[window] for row in rows])


def open_runner(opening: Opening) -> SessionRunner:
    """Open the folder's session."""
    folder = Path(opening.path)
    return SessionRunner(open_session(folder, manifest.read(folder), threads=opening.threads))
