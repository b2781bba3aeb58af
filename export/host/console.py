"""What is printed: results on stdout, messages and progress on stderr; where it is no terminal, lines in place of bars.

Everything goes through `visible`, so that no text of others controls the terminal or begins a line.
"""

import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from . import interrupt, timings
from .text import visible

Item = TypeVar("Item")
_EVERY_S = 30.0
"""Between two lines of a step where there is no terminal."""
_lane: ContextVar[str] = ContextVar("lane", default="")
"""Of this thread: whose work it does beside that of others."""


class Plain(Console):
    """Rich without its markup, emoji codes and highlighting: a text is shown as it is, in one line."""

    def render_str(self, text: str, **options: Any) -> Text:
        return Text(
            visible(text), **{name: options[name] for name in ("style", "justify", "overflow") if name in options}
        )

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*((f"{_lane.get()} |", *objects) if _lane.get() else objects), **options)


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


@contextmanager
def lane(name: str) -> Iterator[None]:
    """Begin every line of this thread with a name, and show no bars: other threads work and print beside it."""
    before = _lane.set(name)
    try:
        yield
    finally:
        _lane.reset(before)


@dataclass(eq=False)
class _Step:
    """Something that takes time, and how far it is."""

    label: str
    detail: str = ""
    lane: str = field(default_factory=_lane.get)
    done: int = 0
    total: int | None = None
    started: float = field(default_factory=time.perf_counter)
    first: tuple[int, float] | None = None
    """What was done, and when, as it was counted for the first time: what comes before says nothing of the rest."""
    holds_others: bool = False

    def count(self, done: int, total: int) -> None:
        """So much is done now."""
        if self.first is None or done < self.done:
            self.first = done, time.perf_counter()
        self.done, self.total = done, total

    def line(self) -> str:
        """For people: `  quantize     60.0 s so far: 35 of 211, about 302 s more`."""
        counted = f"{self.done} of {self.total}" if self.total is not None else ""
        words = ", ".join(filter(None, (self.detail, counted, self._rest())))
        seconds = time.perf_counter() - self.started
        return f"  {self.label:<10} {seconds:6.1f} s so far" + (f": {words}" if words else "")

    def _rest(self) -> str:
        """How long what is left takes at the pace so far; empty: that is not known."""
        if self.total is None or self.first is None or not self.first[0] < self.done < self.total:
            return ""
        done, since = self.first
        return f"about {(time.perf_counter() - since) / (self.done - done) * (self.total - self.done):.0f} s more"


_steps: list[_Step] = []
"""Those that go on, each within the one before of its lane."""


@contextmanager
def _going_on(step: _Step) -> Iterator[_Step]:
    """Meanwhile, where there is no terminal, a line tells every 30 s what is done and how far."""
    ended = threading.Event()
    _steps.append(step)
    if len(_steps) == 1 and not console.is_terminal:
        threading.Thread(target=_report, args=(ended,), daemon=True).start()
    try:
        yield step
    finally:
        ended.set()
        _steps.remove(step)


def _report(ended: threading.Event) -> None:
    """The innermost step of each lane, until the outermost of all has ended or nobody reads."""
    while not ended.wait(_EVERY_S):
        innermost = {step.lane: step for step in list(_steps)}  # a copy: they may end in between
        try:
            for step in innermost.values():
                with lane(step.lane):
                    console.print(step.line(), soft_wrap=True)
        except (OSError, SystemExit):  # rich makes the latter of a broken pipe
            return


@contextmanager
def waiting(reason: str) -> Iterator[None]:
    """Say for what another process's work is awaited, now and every 30 s."""
    console.print(f"  waiting: {reason}", soft_wrap=True)
    with _going_on(_Step("waiting", reason)):
        yield


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("to go"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty() or bool(_lane.get()),
    )


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Iterate with a bar."""
    with counted(label) as show:
        show(0, total)
        for done, item in enumerate(items, 1):
            yield item
            show(done, total)


@contextmanager
def native_held() -> Iterator[None]:
    """Hold back what libraries write to stderr, past Python too; it is shown where the block fails. Our lines go on."""
    before, real = sys.stderr, os.dup(2)
    with (
        tempfile.TemporaryFile() as held,
        os.fdopen(real, "w", encoding="utf-8", errors="backslashreplace") as ours,
        os.fdopen(os.dup(held.fileno()), "w", encoding="utf-8", errors="backslashreplace") as theirs,
    ):
        console.file, sys.stderr = ours, theirs
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            theirs.flush()
            held.seek(0)
            ours.write(visible(held.read().decode(errors="replace"), keep="\n"))
            raise
        finally:
            ours.flush()
            os.dup2(real, 2)
            sys.stderr, console.file = before, None  # type: ignore[assignment]  # whatever stderr is then


def note(text: str) -> None:
    """One line that a build goes on after."""
    console.print(f"  note: {text}", soft_wrap=True)


@contextmanager
def stage(label: str, detail: str = "") -> Iterator[None]:
    """Run a stage with a spinner and end it with one line: label, detail, seconds."""
    step = _Step(label, detail)
    for outer in _steps:
        outer.holds_others |= outer.lane in ("", step.lane)
    with _going_on(step):
        if console.is_terminal and not _lane.get():
            with console.status(console.render_str(f"{label} {detail}")):
                yield
        else:
            yield
    interrupt.check()
    seconds = time.perf_counter() - step.started
    if not step.holds_others:
        timings.add(label, step.lane, seconds)
    console.print(f"  {label:<10} {seconds:6.1f} s  {detail}", soft_wrap=True)


def show_timings() -> None:
    """Say where the time of this process went."""
    for line in timings.lines():
        console.print(line, soft_wrap=True)


@contextmanager
def counted(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that is counted, here or elsewhere; call what it gives with done and total."""
    with _going_on(_Step(label)) as step, _progress() as bar:
        task = bar.add_task(visible(label), total=None)

        def show(done: int, total: int) -> None:
            step.count(done, total)
            bar.update(task, completed=done, total=total)

        yield show
