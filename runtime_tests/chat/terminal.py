"""A conversation on a terminal, or line by line through a pipe. Answers go to stdout, everything else to stderr."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from export.build.command import describe, fail
from export.errors import ExportError
from export.host import disk
from export.host.console import console
from export.host.text import CONVERSATION, visible
from runtime_tests.checks.latency import NOT_TIMED

from .conversation import Answer, Conversation


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
        """An earlier Ctrl-C does not stop the next answer."""
        self._noted = False

    def noted(self) -> bool:
        """Whether Ctrl-C was pressed since."""
        return self._noted


_HELP = """\
/reset         forget the conversation; the system message stays
/system TEXT   another system message, for the conversation so far too; without TEXT the template's own
/save FILE     write the conversation and its cache to a file
/load FILE     go on where a saved one ended
/help          this
/exit          end (Ctrl-D too); Ctrl-C stops an answer, at an empty prompt it ends"""


@dataclass(frozen=True)
class Terminal:
    """Shows one conversation."""

    conversation: Conversation
    timed: bool
    """Whether the session's speed is shown: a reference evaluator's is not."""

    def run(self) -> bool:
        """Answer until the end of the input; whether every message was answered."""
        # whatever the locale says; a line that is not UTF-8 is refused by itself
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        if sys.stdin.isatty() and sys.stdout.isatty():
            with Interrupts() as interrupts:
                say("/help lists the commands, Ctrl-D ends")
                self.answer_all(typed(interrupts), _write_safely, interrupts.forget, interrupts.noted)
            return True
        return self.answer_all(_piped(), _write, forget=lambda: None, stopped=lambda: False)

    def answer_all(
        self,
        lines: Iterator[str],
        show: Callable[[str], None],
        forget: Callable[[], None],
        stopped: Callable[[], bool],
    ) -> bool:
        """Answer line by line; whether every message was answered. One that is refused is a line on stderr."""
        answered = True
        for line in lines:
            try:
                line.encode()
                if line.strip() == "/exit":
                    break
                if not line.strip():
                    continue
                forget()
                if line.startswith("/"):
                    self.obey(line)
                else:
                    self.answer(line, show, stopped)
            except UnicodeEncodeError as error:
                answered = not fail(f"left out: a line that is not UTF-8 (after {line[: error.start][-40:]!r})", 1)
            except ExportError as error:
                answered = not fail(f"left out: {describe(error)}", 1)
        return answered

    def answer(self, message: str, show: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        """One message. Raises ExportError: it is refused."""
        begun: list[str] = []

        def begin(text: str) -> None:
            begun.append(text)
            show(text)

        try:
            answer = self.conversation.ask(message, begin, stopped)
        except ExportError:
            show("\n" if begun else "")
            raise
        show("\n")
        say(self.figures(answer))

    def obey(self, line: str) -> None:
        """Run one command. Raises ExportError: it is unknown, or refused."""
        command, _, text = line.partition(" ")
        if command == "/reset":
            self.conversation.reset()
            say("the conversation begins anew")
        elif command == "/system":
            self.conversation.instruct(text.strip() or None)
            say(f"system: {self.conversation.system or 'as the chat template has it'}")
        elif command in ("/save", "/load"):
            self.keep(command, text.strip())
        elif command == "/help":
            for text in _HELP.split("\n"):
                say(text)
        else:
            raise ExportError(f"unknown command {command}; /help lists them, a message may begin with a space")

    def keep(self, command: str, name: str) -> None:
        """Save or load. Raises ExportError: as `Conversation`."""
        if not name:
            raise ExportError(f"{command} needs the name of a file")
        if not name.isprintable() or (name.startswith("~") and not name.startswith("~/")):
            raise ExportError(f"{command}: {name!r} is no name for a file; write another")
        path, conversation = Path(name).expanduser(), self.conversation
        size = f", {disk.size(conversation.save(path))}" if command == "/save" else ""
        if command == "/load":
            conversation.load(path)
        held = f"{len(conversation.turns)} messages, {len(conversation.cache.tokens)} tokens{size}"
        say(f"{'saved' if size else 'loaded'}: {held}")

    def figures(self, answer: Answer) -> str:
        """The line below an answer."""
        context = f"context {answer.context_used}/{self.conversation.cache.context_length}"
        speed = _speed_of(answer) if self.timed else f"speed {NOT_TIMED}"
        return " · ".join(part for part in (speed, context, answer.end.value) if part)


def _speed_of(answer: Answer) -> str:
    """Rates and time to first token; empty where the answer did not begin."""
    if not answer.prefilled:
        return ""
    decode = f"{answer.decoded / answer.decode_s:.1f} tok/s" if answer.decoded else "–"
    return (
        f"prefill {answer.prefilled} tokens, {answer.prefilled / answer.prefill_s:.1f} tok/s · decode {decode} · "
        f"TTFT {answer.ttft_s:.3f} s"
    )


def say(text: str) -> None:
    """Print a line about the conversation, on stderr."""
    console.print(text, style="dim", soft_wrap=True)


def typed(interrupts: Interrupts) -> Iterator[str]:
    """Lines of a terminal, with editing and history."""
    import readline

    keeps_last = "libedit" in (
        readline.__doc__ or ""
    )  # Pythons of Macs and of uv: the last line, until a key is pressed
    while True:
        stale = readline.get_line_buffer() if keeps_last else ""
        try:
            with interrupts.typing():
                line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if readline.get_line_buffer() in {"", stale}:
                return
            continue
        yield line


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _write_safely(text: str) -> None:
    """Part of an answer: a model must not control the terminal."""
    _write(visible(text, CONVERSATION))


def _write(text: str) -> None:
    """Part of an answer at once, every character: for programs."""
    sys.stdout.write(text)
    sys.stdout.flush()
