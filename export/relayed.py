"""A child process whose lines are printed whole, behind a name. Knows nothing of what it does."""

import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import IO

from .progress import console

STOP_S = 60.0
"""What a child may take to put away what it has begun, before it is killed."""
ERROR = "error: "
_printing = threading.Lock()


class Relayed:
    """A running command. What it says on stderr is said here behind `label`; its stdout is ours.

    It has a process group of its own, so that Ctrl-C reaches it once, from us, and not a second time while it cleans
    up. When we are killed, the first line it cannot say ends it.
    """

    def __init__(self, name: str, label: str, command: Sequence[str], when_ended: "Callable[[Relayed], None]") -> None:
        self.name = name
        self._error: str | None = None
        self._label, self._when_ended = label, when_ended
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def failure(self) -> str | None:
        """Why it failed, in its own words where it has some; None when it ended well."""
        code = self._process.wait()
        if code < 0:
            hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        return (self._error or f"exit code {code}, see above") if code else None

    def stop(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def wait_for_end(self) -> None:
        """Wait until it has put away what it had begun; kill it after a minute."""
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _follow(self) -> None:
        """Relay both streams to their ends."""
        assert self._process.stdout
        assert self._process.stderr
        errors = threading.Thread(target=relay, args=(self._process.stderr, self._say), daemon=True)
        errors.start()
        relay(self._process.stdout, lambda line: print(line, flush=True))
        errors.join()
        self._process.wait()
        self._when_ended(self)

    def _say(self, line: str) -> None:
        if line.startswith(ERROR):
            self._error = line.removeprefix(ERROR)
        console.print(f"{self._label} {line}", markup=False, soft_wrap=True)


def relay(stream: IO[str], say: Callable[[str], object]) -> None:
    """Say each line of a stream; when nobody listens to us any more, the stream is closed, which ends its writer."""
    with stream:
        for line in stream:
            try:
                with _printing:
                    say(line.rstrip("\n"))
            except (OSError, SystemExit):  # rich makes the latter of a broken pipe
                return
