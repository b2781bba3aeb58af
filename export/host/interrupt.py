"""Ctrl-C and SIGTERM: raised at once, and noted, because libraries swallow KeyboardInterrupt."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_noted: list[int] = []
_held: list[bool] = []


def listen() -> None:
    """From now on both signals end the command; one that the shell set to be ignored stays ignored."""
    _noted.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def _note(number: int, _frame: FrameType | None) -> None:
    _noted.append(number)
    if not _held:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """Delay a signal to the end of the block: it must not come between starting a process and recording it."""
    _held.append(True)
    try:
        yield
    finally:
        _held.pop()
    check()


def check() -> None:
    """Raise again when a signal came and a library swallowed it; called before anything final is done."""
    if _noted:
        raise KeyboardInterrupt
