"""Ctrl-C and SIGTERM: raised at once, and noted, because libraries swallow KeyboardInterrupt. Knows no builds."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_noted: list[int] = []
_held: list[bool] = []


def listen() -> None:
    """From now on both signals end the command; one that the shell told us to ignore stays ignored."""
    _noted.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)


def note(number: int, _frame: FrameType | None) -> None:
    """Remember the signal and raise what Ctrl-C raises."""
    _noted.append(number)
    if not _held:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """A signal that comes meanwhile is raised at the end: not between starting a process and knowing that it runs."""
    _held.append(True)
    try:
        yield
    finally:
        _held.pop()
    check()


def check() -> None:
    """Raise again when a signal came and somebody swallowed it: called before anything final is done."""
    if _noted:
        raise KeyboardInterrupt
