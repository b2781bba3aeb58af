"""`python -m runtime_tests chat` on a terminal of its own, the fake format plugged in, its session slow.

With `--without-handler` Ctrl-C does what it does in any Python program.
"""

import fcntl
import importlib
import sys
import termios
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import export.formats
import runtime_tests.sessions
from export.build.command import run
from runtime_tests.__main__ import app
from runtime_tests.chat.terminal import Interrupts

export.formats.__path__.append(str(Path(__file__).parent / "backends"))
runtime_tests.sessions.__path__.append(str(Path(__file__).parent / "sessions"))
FakeSession = importlib.import_module("runtime_tests.sessions.fake").FakeSession
quick = FakeSession.feed


def slow(self, tokens):
    time.sleep(0.02)
    return quick(self, tokens)


if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # its Ctrl-C is for this process
    FakeSession.feed = slow
    if "--without-handler" in sys.argv:
        sys.argv.remove("--without-handler")
        Interrupts.__enter__ = lambda self: self
        Interrupts.__exit__ = lambda self, *_: None
    sys.exit(run(app))
