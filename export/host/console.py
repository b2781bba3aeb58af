"""What is printed: results on stdout, messages and progress on stderr; no bars where it is not a terminal.

Everything goes through `visible`, so that no text of others controls the terminal or begins a line.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from . import interrupt
from .text import visible

Item = TypeVar("Item")


class Plain(Console):
    """Rich without its markup, emoji codes and highlighting: a text is shown as it is, in one line."""

    def render_str(self, text: str, **options: Any) -> Text:
        return Text(
            visible(text), **{name: options[name] for name in ("style", "justify", "overflow") if name in options}
        )


console = Plain(stderr=True)


def say(*lines: str, flush: bool = False) -> None:
    """Print results on stdout, each text as one line."""
    for line in lines:
        print(visible(line), flush=flush)


class LogLines(logging.Formatter):
    """One visible line for a message; what a library adds of a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 – logging's name
        return visible(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n")


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<10}", markup=False),
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
        task = bar.add_task(visible(label), total=total)
        for item in items:
            yield item
            bar.advance(task)


def note(text: str) -> None:
    """One line that a build goes on after."""
    console.print(f"  note: {text}", soft_wrap=True)


@contextmanager
def stage(label: str, detail: str = "") -> Iterator[None]:
    """Run a stage with a spinner and end it with one line: label, detail, seconds."""
    started = time.perf_counter()
    if console.is_terminal:
        with console.status(console.render_str(f"{label} {detail}")):
            yield
    else:
        yield
    interrupt.check()
    console.print(f"  {label:<10} {time.perf_counter() - started:6.1f} s  {detail}", soft_wrap=True)


@contextmanager
def counted(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that is done elsewhere; call what it gives with done and total."""
    with _progress() as bar:
        task = bar.add_task(visible(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
