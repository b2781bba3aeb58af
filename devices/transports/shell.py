"""The shell scripts a device runs: POSIX sh with toybox, coreutils or BSD tools."""

import secrets
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from . import Completed, DeadlineError, DeviceLostError, processes
from .address import Link
from .processes import Deadline

ANSWER_S = 20
"""How long a device may take for a small question."""
PING_S = 5
PROOF = 42
"""An exit status nobody gives by chance."""
_FAILED = 3
"""Exit status of a failed script: no client program uses this number for its own errors."""

_GUARDED = """\
cd {folder} || exit {failed}
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
case $code in {unsure}) echo $code >{status} ;; esac
exit $code
"""

_HASH = "if command -v sha256sum >/dev/null; then h=sha256sum; else h='shasum -a 256'; fi"


def quoted(words: Iterable[str]) -> str:
    """Words a shell reads back as they are."""
    return " ".join(shlex.quote(word) for word in words)


def _guarded(argv: Sequence[str], *, folder: str, limit_s: int, status: str, unsure: Iterable[int]) -> str:
    """Run a program so that nothing of it stays, however the run ends.

    It leads a process group of its own. Two watches kill that group: one when the script's stdin ends, which stays
    open as long as the client lives, the other after `limit_s` seconds. An exit status that the client program could
    also give by itself is written to the file `status`.
    """
    return _GUARDED.format(
        folder=shlex.quote(folder),
        failed=_FAILED,
        limit_s=limit_s,
        command=quoted(argv),
        unsure="|".join(map(str, sorted(unsure))) or "none",
        status=shlex.quote(status),
    )


def survey(names: Iterable[str]) -> str:
    """Prints `df -Pk` of the working folder, then the sha256 of every file at or below the names."""
    hashing = "\n".join(
        f'if [ -d {name} ]; then find {name} -type f -exec $h "{{}}" +; elif [ -e {name} ]; then $h {name}; fi'
        for name in map(shlex.quote, names)
    )
    return f"{_HASH}\ndf -Pk .\n{hashing}\ntrue"


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
        """Run a program of which nothing stays, however it ends. Raises DeadlineError, DeviceLostError."""
        status = f".exit-{secrets.token_hex(8)}"
        # Later than our own deadline: this one is for a device that can no longer be reached.
        limit_s = int(deadline.left_s()) + 2 * processes.HANG_UP_S
        unsure = self.link.unsure
        script = _guarded(argv, folder=self.folder, limit_s=limit_s, status=status, unsure=unsure)
        with self._in_time(argv[0], deadline):
            ended = processes.call_held(self.link.client(script), deadline)
        if ended.returncode in unsure:
            confirmed = self.ask(f"cat {status} && rm {status}", Deadline.after(ANSWER_S), step=argv[0])
            if confirmed.stdout.strip() != str(ended.returncode).encode():
                raise self._lost(argv[0], ended)
        return ended

    def ask(
        self,
        script: str,
        deadline: Deadline,
        *,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
        step: str = "a file operation",
    ) -> Completed:
        """Run a script that ends by itself; its exit status is 0 or not. Raises DeadlineError, DeviceLostError."""
        # It ends with 0 or _FAILED and nothing else, so that a lost connection cannot look like an answer.
        inside = f"(\ncd {quoted([self.folder])} || exit 1\n{script}\n) || exit {_FAILED}"
        with self._in_time(step, deadline):
            ended = processes.call(self.link.client(inside), deadline, stdin=stdin, stdout=stdout)
        if ended.returncode in self.link.unsure:
            raise self._lost(step, ended)
        return ended

    def _lost(self, step: str, ended: Completed) -> DeviceLostError:
        return DeviceLostError(f"{self.link.name}: lost during {step}: {self.link.explain(ended.stderr)}")

    @contextmanager
    def _in_time(self, step: str, deadline: Deadline) -> Iterator[None]:
        """Turn TimeoutError into DeadlineError where the device still answers, DeviceLostError where it does not."""
        try:
            yield
        except TimeoutError:
            if self._answers():
                late = f"{step} did not end within {deadline.limit_s:g} s and was ended"
                raise DeadlineError(f"{self.link.name}: {late}") from None
            gone = f"stopped answering during {step} (limit {deadline.limit_s:g} s)"
            raise DeviceLostError(f"{self.link.name}: {gone}; check its power and its connection") from None

    def _answers(self) -> bool:
        try:
            return processes.call(self.link.client(f"exit {PROOF}"), Deadline.after(PING_S)).returncode == PROOF
        except TimeoutError:
            return False
