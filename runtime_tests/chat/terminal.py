"""A conversation on a terminal, or line by line through a pipe. Answers go to stdout, everything else to stderr."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from export.errors import ExportError
from export.progress import console

from ..latency import NOT_TIMED
from .conversation import Answer, Conversation, NoRoomError
from .interrupts import Interrupts

HELP = """\
/reset         forget the conversation; the system message stays
/system TEXT   another system message, for the conversation so far too; without TEXT the template's own
/help          this
/exit          end (Ctrl-D too); Ctrl-C stops an answer, at an empty prompt it ends"""
REPLACED = {code: "\N{REPLACEMENT CHARACTER}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""Control characters: a model must not steer the terminal."""


@dataclass(frozen=True)
class Terminal:
    """One conversation and how it is shown."""

    conversation: Conversation
    timed: bool
    """Whether its session's speed means anything."""

    def run(self) -> bool:
        """Until the end of the input; whether every message was answered."""
        for stream in (sys.stdin, sys.stdout):  # whatever the locale says
            stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                with Interrupts() as interrupts:
                    say("/help lists the commands, Ctrl-D ends")
                    self.answer_all(typed(interrupts), on_terminal, interrupts.forget, interrupts.noted)
                return True
            return self.answer_all(piped(), as_it_is, forget=lambda: None, stopped=lambda: False)
        except UnicodeDecodeError as error:
            raise ExportError(f"standard input: not UTF-8 ({error.reason} at byte {error.start} of a line)") from None

    def answer_all(
        self, lines: Iterator[str], show: Callable[[str], None], forget: Callable[[], None], stopped: Callable[[], bool]
    ) -> bool:
        """Line by line; whether every message was answered."""
        whole = True
        for line in lines:
            if line == "/exit":
                break
            if not line.strip():
                continue
            forget()
            whole &= self.obey(line) if line.startswith("/") else self.answer(line, show, stopped)
        return whole

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
        """One command; False for one that is none."""
        command, _, text = line.partition(" ")
        if command == "/reset":
            self.conversation.reset()
            say("the conversation begins anew")
        elif command == "/system":
            self.conversation.system = text.strip() or None
            say(f"system: {self.conversation.system or 'as the chat template has it'}")
        elif command == "/help":
            say(HELP)
        else:
            say(f"unknown command {command}; /help lists them, a message may begin with a space")
            return False
        return True

    def figures(self, answer: Answer) -> str:
        """The line below an answer."""
        context = f"context {answer.context_used}/{self.conversation.context_length}"
        speed = speed_of(answer) if self.timed else f"speed {NOT_TIMED}"
        return " · ".join(part for part in (speed, context, answer.end.value) if part)


def speed_of(answer: Answer) -> str:
    """Rates and time to first token; nothing of an answer that did not begin."""
    if not answer.prefilled:
        return ""
    decode = f"{answer.decoded / answer.decode_s:.1f} tok/s" if answer.decoded else "–"
    return (
        f"prefill {answer.prefilled} tokens, {answer.prefilled / answer.prefill_s:.1f} tok/s · decode {decode} · "
        f"TTFT {answer.ttft_s:.3f} s"
    )


def say(text: str) -> None:
    """What is no answer."""
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


def piped() -> Iterator[str]:
    """Lines of a pipe or file."""
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def on_terminal(text: str) -> None:
    """Part of an answer, at once."""
    as_it_is(text.translate(REPLACED))


def as_it_is(text: str) -> None:
    """The same for programs: every character."""
    sys.stdout.write(text)
    sys.stdout.flush()
