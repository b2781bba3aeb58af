"""`python -m runtime_tests chat` on a real terminal: what Ctrl-C and Ctrl-D end, and what they do not."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

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
    terminal = screen()
    assert "/help lists the commands" in terminal.text
    terminal.type("hello\n")
    terminal.wait("&&&&")
    terminal.type(CTRL_C)
    terminal.wait(PROMPT)
    first = figures(terminal.text)
    assert first["prefill"] == len("hello") + 3
    assert first["context"] < 200
    assert terminal.text.split("prefill")[0].strip("^C&\r\n") == ""

    terminal.type("why\n")  # the session goes on, with the partial answer in its past
    terminal.wait("&&&&")
    terminal.type(CTRL_C)
    terminal.wait(PROMPT)
    second = figures(terminal.text)
    assert second["prefill"] == len("why") + 5
    assert second["context"] > first["context"] + second["prefill"]

    terminal.type("half a line")
    terminal.wait("half a line")
    terminal.type(CTRL_C)  # leaves the line
    terminal.wait(PROMPT, again=CTRL_C)
    terminal.type("/reset\n")
    terminal.wait(r"the conversation begins anew\s+> $")
    terminal.type(CTRL_C)
    assert terminal.end(again=CTRL_C) == 0
    assert "Traceback" not in terminal.text
    assert "interrupted" not in terminal.text


def test_without_the_handler_ctrl_c_would_end_the_chat(screen):
    """The twin."""
    terminal = screen("--without-handler")
    terminal.type("hello\n")
    terminal.wait("&&&&")
    terminal.type(CTRL_C)
    assert terminal.end() == 130


def test_ctrl_d_ends(screen):
    terminal = screen()
    terminal.type(CTRL_D)
    assert terminal.end() == 0


def figures(text):
    numbers = re.search(r"prefill (\d+) tokens.* · context (\d+)/256 · stopped", text)
    assert numbers, text
    return {"prefill": int(numbers[1]), "context": int(numbers[2])}
