"""Progress bars and messages on stderr; no bars where it is not a terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import interrupt

Item = TypeVar("Item")
console = Console(stderr=True, highlight=False)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Iterate with a bar."""
    with _progress() as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            yield item
            bar.advance(task)


def say(note: str) -> None:
    """One line that a build goes on after; a checkpoint's words reach no terminal as commands."""
    text = "".join(letter if letter.isprintable() else "?" for letter in note)
    console.print(f"  note: {text}", markup=False, soft_wrap=True)


@contextmanager
def stage(label: str, detail: str = "") -> Iterator[None]:
    """Run a stage with a spinner and end it with one line: label, detail, seconds."""
    started = time.perf_counter()
    if console.is_terminal:
        with console.status(f"{label} {detail}"):
            yield
    else:
        yield
    interrupt.check()
    console.print(f"  {label:<10} {time.perf_counter() - started:6.1f} s  {detail}", soft_wrap=True)


@contextmanager
def counted(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that is done elsewhere; call what it gives with done and total."""
    with _progress() as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
