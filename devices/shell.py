"""Scripts on a device, each with a deadline, and what their end means. Knows nothing of adb or ssh."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from . import processes, scripts
from .link import Link
from .processes import Deadline
from .transport import Completed, DeadlineError, DeviceLostError

ANSWER_S = 20
"""How long a device may take for a small question."""
PING_S = 5
PROOF = 42
"""An exit status nobody gives by chance."""


class Shell:
    """The working folder of one device, through any link."""

    def __init__(self, link: Link, folder: str) -> None:
        self.link = link
        self.folder = folder

    def run(self, argv: Sequence[str], deadline: Deadline) -> Completed:
        """Run a program of which nothing stays, however it ends. Raises DeadlineError, DeviceLostError."""
        status = f".exit-{secrets.token_hex(8)}"
        # Later than our own deadline: that one is the answer, this one is for a device we can no longer reach.
        limit_s = int(deadline.left_s()) + 2 * processes.HANG_UP_S
        unsure = self.link.unsure
        script = scripts.guarded(argv, folder=self.folder, limit_s=limit_s, status=status, unsure=unsure)
        with self.in_time(argv[0], deadline):
            ended = processes.call_held(self.link.client(script), deadline)
        if ended.returncode in unsure:
            kept = self.ask(f"cat {status} && rm {status}", Deadline.after(ANSWER_S), what=argv[0])
            if kept.stdout.strip() != str(ended.returncode).encode():
                raise self.lost(argv[0], ended)
        return ended

    def ask(
        self,
        script: str,
        deadline: Deadline,
        *,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
        what: str = "a file operation",
    ) -> Completed:
        """Run a script that ends by itself; its exit status is 0 or not. Raises DeadlineError, DeviceLostError."""
        inside = scripts.answered(f"cd {scripts.quoted([self.folder])} || exit 1\n{script}")
        with self.in_time(what, deadline):
            ended = processes.call(self.link.client(inside), deadline, stdin=stdin, stdout=stdout)
        if ended.returncode in self.link.unsure:
            raise self.lost(what, ended)
        return ended

    def lost(self, what: str, ended: Completed) -> DeviceLostError:
        """The error of a connection that ended."""
        return DeviceLostError(f"{self.link.name}: lost during {what}: {self.link.explain(ended.stderr)}")

    @contextmanager
    def in_time(self, what: str, deadline: Deadline) -> Iterator[None]:
        """A device that is late and one that is gone are two errors."""
        try:
            yield
        except TimeoutError:
            if self.answers():
                late = f"{what} did not end within {deadline.limit_s:g} s and was ended"
                raise DeadlineError(f"{self.link.name}: {late}") from None
            gone = f"stopped answering during {what} (limit {deadline.limit_s:g} s)"
            raise DeviceLostError(f"{self.link.name}: {gone}; check its power and its connection") from None

    def answers(self) -> bool:
        """Whether the device runs a script now."""
        try:
            return processes.call(self.link.client(f"exit {PROOF}"), Deadline.after(PING_S)).returncode == PROOF
        except TimeoutError:
            return False
