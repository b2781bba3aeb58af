"""`python -m runtime_tests chat` on a real terminal: what Ctrl-C and Ctrl-D end, and what they do not."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from runtime_tests.chat import terminal
from tests.support.artifacts import set_fault
from tests.support.processes import FAKES

PATIENCE_S = 120.0
AGAIN_S = 10.0
CTRL_C, CTRL_D = "\x03", "\x04"
PROMPT = r"> $"


class Screen:
    """A chat on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.ours, theirs = pty.openpty()
        self.child = subprocess.Popen(
            [sys.executable, str(FAKES / "chat.py"), "chat", *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def type(self, text):
        """Keys; what was shown before is not looked at again."""
        self.text = ""
        os.write(self.ours, text.encode())

    def wait(self, pattern, again=""):
        """Until the terminal shows it; None: until the program is gone.

        `again` is typed every few seconds: CPython's readline looks at a signal that came just before it began to wait
        only when the next key comes.
        """
        deadline, pressed = time.monotonic() + PATIENCE_S, time.monotonic()
        while pattern is None or not re.search(pattern, self.text):
            assert time.monotonic() < deadline, self.text
            if again and time.monotonic() > pressed + AGAIN_S:
                os.write(self.ours, again.encode())
                pressed = time.monotonic()
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    self.text += os.read(self.ours, 4096).decode()
                except OSError:  # the other side is closed
                    assert pattern is None, self.text
                    return self.text
        return self.text

    def end(self, again=""):
        """The exit code, when it ends by itself."""
        self.wait(None, again)
        return self.child.wait(timeout=PATIENCE_S)

    def close(self):
        self.child.kill()
        self.child.wait()
        os.close(self.ours)


@pytest.fixture
def screen(artifact):
    """Opens the chat with an artifact whose answers do not end before the context does."""
    set_fault(artifact, "constant token")
    opened = []

    def start(*arguments):
        opened.append(Screen(artifact, "--max-new-tokens", "200", *arguments))
        opened[0].wait(PROMPT)
        return opened[0]

    yield start
    opened[0].close()


def test_ctrl_c_stops_the_answer_keeps_what_it_said_and_at_an_empty_prompt_ends(screen):
    chat = screen()
    assert "/help lists the commands" in chat.text
    chat.type("hello\n")
    chat.wait("&&&&")
    chat.type(CTRL_C)
    chat.wait(PROMPT)
    first = figures(chat.text)
    assert first["prefill"] == len("hello") + 3
    assert first["context"] < 200
    assert chat.text.split("prefill")[0].strip("^C&\r\n") == ""

    chat.type("why\n")  # the session goes on, with the partial answer in its past
    chat.wait("&&&&")
    chat.type(CTRL_C)
    chat.wait(PROMPT)
    second = figures(chat.text)
    assert second["prefill"] == len("why") + 5
    assert second["context"] > first["context"] + second["prefill"]

    chat.type("half a line")
    chat.wait("half a line")
    chat.type(CTRL_C)  # leaves the line
    chat.wait(PROMPT, again=CTRL_C)
    chat.type("/reset\n")
    chat.wait(r"the conversation begins anew\s+> $")
    chat.type(CTRL_C)
    assert chat.end(again=CTRL_C) == 0
    assert "Traceback" not in chat.text
    assert "interrupted" not in chat.text


def test_without_the_handler_ctrl_c_would_end_the_chat(screen):
    """The twin."""
    chat = screen("--without-handler")
    chat.type("hello\n")
    chat.wait("&&&&")
    chat.type(CTRL_C)
    assert chat.end() == 130


def test_ctrl_d_ends(screen):
    chat = screen()
    chat.type(CTRL_D)
    assert chat.end() == 0


@pytest.mark.parametrize("library", ["GNU readline", "libedit readline"])
def test_ctrl_c_at_an_empty_prompt_ends_with_either_library(monkeypatch, library):
    """What `get_line_buffer` gives was seen with both: libedit's, of Macs, still has the line before."""
    buffer, keys = [""], iter(["half^C", "whole", "^C", "never asked for"])

    def ask(prompt):
        line, interrupted, _ = (typed := next(keys)).partition("^C")
        if typed != "^C" or library == "GNU readline":
            buffer[0] = line
        if interrupted:
            raise KeyboardInterrupt
        return line

    described = f"Importing this module enables command line editing using {library}."
    monkeypatch.setitem(sys.modules, "readline", SimpleNamespace(__doc__=described, get_line_buffer=lambda: buffer[0]))
    monkeypatch.setattr("builtins.input", ask)
    assert list(terminal.typed(terminal.Interrupts())) == ["whole"]
    assert next(keys) == "never asked for"


def figures(text):
    numbers = re.search(r"prefill (\d+) tokens.* · context (\d+)/256 · stopped", text)
    assert numbers, text
    return {"prefill": int(numbers[1]), "context": int(numbers[2])}
