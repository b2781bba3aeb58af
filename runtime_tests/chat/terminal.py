"""A conversation on a terminal, or line by line through a pipe. Answers go to stdout, everything else to stderr."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from export.errors import ExportError
from export.host.console import console
from runtime_tests.checks.latency import NOT_TIMED

from .conversation import Answer, Conversation, NoRoomError


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
/help          this
/exit          end (Ctrl-D too); Ctrl-C stops an answer, at an empty prompt it ends"""
_REPLACED = {code: "\N{REPLACEMENT CHARACTER}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""Control characters: a model must not control the terminal."""


@dataclass(frozen=True)
class Terminal:
    """Shows one conversation."""

    conversation: Conversation
    timed: bool
    """Whether the session's speed is shown: a reference evaluator's is not."""

    def run(self) -> bool:
        """Answer until the end of the input; whether every message was answered."""
        for stream in (sys.stdin, sys.stdout):  # whatever the locale says
            stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                with Interrupts() as interrupts:
                    say("/help lists the commands, Ctrl-D ends")
                    self.answer_all(typed(interrupts), _write_safely, interrupts.forget, interrupts.noted)
                return True
            return self.answer_all(_piped(), _write, forget=lambda: None, stopped=lambda: False)
        except UnicodeDecodeError as error:
            raise ExportError(f"standard input: not UTF-8 ({error.reason} at byte {error.start} of a line)") from None

    def answer_all(
        self, lines: Iterator[str], show: Callable[[str], None], forget: Callable[[], None], stopped: Callable[[], bool]
    ) -> bool:
        """Answer line by line; whether every message was answered."""
        answered = True
        for line in lines:
            if line == "/exit":
                break
            if not line.strip():
                continue
            forget()
            answered &= self.obey(line) if line.startswith("/") else self.answer(line, show, stopped)
        return answered

    def answer(self, message: str, show: Callable[[str], None], stopped: Callable[[], bool]) -> bool:
        """One message; False where it does not fit."""
        try:
            answer = self.conversation.ask(message, show, stopped)
        except NoRoomError as error:
            say(str(error))
            return False
        show("\n")
        say(self.figures(answer))
        return True

    def obey(self, line: str) -> bool:
        """Run one command; False where it is unknown."""
        command, _, text = line.partition(" ")
        if command == "/reset":
            self.conversation.reset()
            say("the conversation begins anew")
        elif command == "/system":
            self.conversation.system = text.strip() or None
            say(f"system: {self.conversation.system or 'as the chat template has it'}")
        elif command == "/help":
            say(_HELP)
        else:
            say(f"unknown command {command}; /help lists them, a message may begin with a space")
            return False
        return True

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
    """Print a message about the conversation, on stderr."""
    console.print(text, style="dim", markup=False, soft_wrap=True)


def typed(interrupts: Interrupts) -> Iterator[str]:
    """Lines of a terminal, with editing and history."""
    import readline

    while True:
        try:
            with interrupts.typing():
                line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if not readline.get_line_buffer():
                return
            continue
        yield line


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _write_safely(text: str) -> None:
    """Part of an answer, without control characters."""
    _write(text.translate(_REPLACED))


def _write(text: str) -> None:
    """Part of an answer at once, every character: for programs."""
    sys.stdout.write(text)
    sys.stdout.flush()
