"""Ctrl-C in a chat: it leaves the line that is typed, and only stops the answer that is written."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Takes SIGINT over; used as a context."""

    def __init__(self) -> None:
        self._typing = False
        self._noted = False

    def __enter__(self) -> "Interrupts":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._typing:
            raise KeyboardInterrupt
        self._noted = True

    @contextmanager
    def typing(self) -> Iterator[None]:
        """Meanwhile Ctrl-C raises KeyboardInterrupt."""
        self._typing = True
        try:
            yield
        finally:
            self._typing = False

    def forget(self) -> None:
        """What came before does not stop the next answer."""
        self._noted = False

    def noted(self) -> bool:
        """Whether Ctrl-C came since."""
        return self._noted
