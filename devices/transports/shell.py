"""The shell scripts a device runs: POSIX sh with toybox, busybox, coreutils or BSD tools."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from . import Completed, DeadlineError, DeviceLostError, FloodError, marks, processes
from .address import Link
from .processes import Deadline

ANSWER_S = 20
"""How long a device may take for a small question."""
PING_S = 5

_GUARDED = """\
cd {folder} || {{ say 1; exit; }}
if command -v setsid >/dev/null; then own=setsid; else own=; set -m; fi
exec 3<&0
$own {command} </dev/null 3<&- &
job=$!
watch() {{
  trap 'kill -KILL $! 2>/dev/null; exit' TERM
  "$@" <&3 &
  wait $!
  kill -KILL -$job $job
}}
watch cat >/dev/null 2>&1 &
watches=$!
watch sleep {limit_s} >/dev/null 2>&1 &
watches="$watches $!"
exec 3<&-
wait $job
code=$?
kill -TERM $watches 2>/dev/null
wait
kill -KILL -$job 2>/dev/null
say $code
"""

_HASH = """\
if command -v sha256sum >/dev/null; then h=sha256sum
elif command -v shasum >/dev/null; then h='shasum -a 256'
else echo 'neither sha256sum nor shasum is there: install coreutils' >&2; exit 1; fi"""


def quoted(words: Iterable[str]) -> str:
    """Words a shell reads back as they are."""
    return " ".join(shlex.quote(word) for word in words)


def _guarded(argv: Sequence[str], *, folder: str, limit_s: int) -> str:
    """Run a program so that nothing of it stays, however the run ends.

    It leads a process group of its own. Two watches kill that group: one when the script's stdin ends, which stays
    open as long as the client lives, the other after `limit_s` seconds.
    """
    return _GUARDED.format(folder=shlex.quote(folder), limit_s=limit_s, command=quoted(argv))


def survey(names: Iterable[str]) -> str:
    """Prints `df -Pk` of the working folder, then the sha256 of every file at or below the names."""
    hashing = "\n".join(
        f'if [ -d {name} ]; then find {name} -type f -exec $h "{{}}" + || exit 1\n'
        f"elif [ -e {name} ]; then $h {name} || exit 1; fi"
        for name in map(shlex.quote, names)
    )
    return f"{_HASH}\ndf -Pk . || exit 1\n{hashing}"


def check_hashes(digests: Mapping[str, str]) -> str:
    """Fail unless every file of path → sha256 is there with that hash.

    Not with `sha256sum -c`: toybox, reading the list from stdin, ends with 0 whatever it finds.
    """
    expected = "\n".join(f"{digest}  {path}" for path, digest in digests.items())
    return f'{_HASH}\n[ "$($h {quoted(digests)})" = {shlex.quote(expected)} ] || exit 1'


class Shell:
    """The working folder of one device, through any link."""

    def __init__(self, link: Link, folder: str) -> None:
        self.link = link
        self.folder = folder

    def run(self, argv: Sequence[str], deadline: Deadline) -> Completed:
        """Run a program of which nothing stays, however it ends. Raises DeadlineError, DeviceLostError, FloodError."""
        # Later than our own deadline: this one is for a device that can no longer be reached.
        limit_s = int(deadline.left_s()) + 2 * processes.HANG_UP_S
        script = marks.opened(_guarded(argv, folder=self.folder, limit_s=limit_s), mark := marks.new())
        with self._in_time(argv[0], deadline):
            ended = processes.call_held(self.link.client(script), deadline)
        return self._answer(ended, mark, argv[0])

    def ask(
        self,
        script: str,
        deadline: Deadline,
        *,
        stdin: IO[bytes] | None = None,
        step: str = "a file operation",
        most_bytes: int = processes.MOST_BYTES,
    ) -> Completed:
        """Run a script that ends by itself. Raises DeadlineError, DeviceLostError, FloodError."""
        inside = marks.enclosed(f"cd {quoted([self.folder])} || exit 1\n{script}", mark := marks.new())
        with self._in_time(step, deadline):
            ended = processes.call(self.link.client(inside), deadline, stdin=stdin, most_bytes=most_bytes)
        return self._answer(ended, mark, step)

    def _answer(self, ended: Completed, mark: str, step: str) -> Completed:
        if (answer := marks.answer(ended, mark)) is None:
            raise DeviceLostError(
                f"{self.link.name}: lost during {step}: {self.link.explain(marks.erased(ended, mark))}"
            )
        return answer

    @contextmanager
    def _in_time(self, step: str, deadline: Deadline) -> Iterator[None]:
        """Turn TimeoutError into DeadlineError where the device still answers, DeviceLostError where it does not.

        FloodError gets the device's name.
        """
        try:
            yield
        except FloodError as error:
            raise FloodError(f"{self.link.name}: {step} {error}") from None
        except TimeoutError:
            if self._answers():
                late = f"{step} did not end within {deadline.limit_s:g} s and was ended"
                raise DeadlineError(f"{self.link.name}: {late}") from None
            gone = f"stopped answering during {step} (limit {deadline.limit_s:g} s)"
            raise DeviceLostError(f"{self.link.name}: {gone}; check its power and its connection") from None

    def _answers(self) -> bool:
        try:
            ended = processes.call(
                self.link.client(marks.enclosed("true", mark := marks.new())), Deadline.after(PING_S)
            )
            return marks.answer(ended, mark) is not None
        except (TimeoutError, FloodError):
            return False
