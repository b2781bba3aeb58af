"""Child processes: their limits, their lines, their result, and the name of the signal that ended one.

Imports nothing of ours: run as a script, this file is the child of a `LimitedWorker`, which starts fast and without
torch.
"""

import atexit
import json
import math
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

_DOOR = Path(__file__).parents[2] / "llama_on_device.py"
OUTPUT_BYTES = 2**22
"""Of an output, its end is returned."""
_PROGRESS_BYTES = 2**16
_LONGEST_PAUSE_S = 0.05
_STOP_S = 60.0
"""Time for a background process to clean up before it is killed."""
_PARENT = "LLAMA_PARENT"
"""Environment variable: the process that started this one."""
_PARENT_CHECK_S = 0.5
_LOOK_S = 0.1
"""Between two looks at the memory of a worker that computes."""
_ROOM_BESIDE = 2
"""So many times its limit a worker may hold with its libraries, where the system itself sets no limit (macOS)."""
ERROR = "error: "
_printing = threading.Lock()


def signal_name(number: int) -> str:
    """`SIGSEGV` for 11, `signal 99` for a number without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_line(text: str) -> str:
    """The last line that is not blank, stripped; empty where there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def end_with_parent() -> None:
    """From now on this process ends when its parent is gone, however that ended: nobody waits for its result.

    The parent is the one that `run` names: it may have ended while this process was still loading.
    """

    def check(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=check, args=(int(os.environ.pop(_PARENT, os.getppid())),), daemon=True).start()


def wait_asleep() -> None:
    """From now on threads of libgomp wait asleep, in children too, and here where torch is not loaded yet.

    They would turn while they wait, and hold up every other process that needs their core. What a user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def python(module: str) -> tuple[str, ...]:
    """The beginning of a command that runs one of our modules, in whatever folder; nothing there is imported."""
    return sys.executable, "-P", str(_DOOR), module


@dataclass(frozen=True)
class Exit:
    """How a process ended."""

    returncode: int
    """Negative: the signal that ended it."""
    out: str
    """The last 4 MiB of stdout."""
    err: str
    """The last 4 MiB of stderr; of the log where both went there."""
    seconds: float
    peak_rss_bytes: int
    """Of the process or the largest one it started; at least what our own process held when it started the child."""

    @property
    def last_words(self) -> str:
        """The last line on stderr."""
        return last_line(self.err)


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    given: bytes = b"",
    limit_s: float = math.inf,
    watch: Callable[[str], bool] = lambda _: False,
    log: IO[bytes] | None = None,
) -> Exit:
    """Run a command with `given` as its stdin; what is left of its process group at the end is killed.

    `watch` is called a few times each second with the last line of stdout; when it returns true, the time limit starts
    anew. A `log`, open for reading too, receives both outputs. Raises TimeoutError.
    """
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin.write(given)
        stdin.seek(0)
        started = time.perf_counter()
        child = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=log or out,
            stderr=log or err,
            cwd=cwd,
            env={**os.environ, _PARENT: str(os.getpid())},
            start_new_session=True,  # it leads a process group, so that what it starts can be ended with it
        )
        try:
            peak_rss_bytes = _follow(child, out, limit_s, watch)
            seconds = time.perf_counter() - started
        finally:
            end_group(child.pid)
            child.wait()
        return Exit(
            child.returncode, _tail(out, OUTPUT_BYTES), _tail(log or err, OUTPUT_BYTES), seconds, peak_rss_bytes
        )


def peak_bytes(usage: resource.struct_rusage, platform: str = sys.platform) -> int:
    """Most memory that was resident, of getrusage or wait4: macOS counts bytes there, all others KiB."""
    return usage.ru_maxrss if platform == "darwin" else usage.ru_maxrss * 1024


def end_group(leader: int) -> None:
    """Kill what is left of a process group: on macOS one of ended processes that nobody has waited for gives EPERM."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _follow(child: subprocess.Popen[bytes], out: IO[bytes], limit_s: float, watch: Callable[[str], bool]) -> int:
    """Wait for the end of a child and give its peak memory, bytes."""
    deadline, pause_s = time.monotonic() + limit_s, 0.001
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)  # collected here, so that Popen does not wait again
            return peak_bytes(usage)
        if watch(last_line(_tail(out, _PROGRESS_BYTES))):
            deadline = time.monotonic() + limit_s
        if time.monotonic() >= deadline:
            raise TimeoutError(f"no end within {limit_s:g} s")
        time.sleep(pause_s := min(2 * pause_s, _LONGEST_PAUSE_S))


def _tail(file: IO[bytes], most_bytes: int) -> str:
    """The end of a file that a child may still write to; the file position, which is the child's too, stays."""
    size = os.fstat(file.fileno()).st_size
    start = max(0, size - most_bytes)
    return os.pread(file.fileno(), size - start, start).decode("utf-8", errors="replace")


class BackgroundProcess:
    """A running command. Each line of its stderr is passed to `show`; its stdout goes to ours.

    It has a process group of its own, so that Ctrl-C reaches it once, from us, and not a second time while it cleans
    up. When this process is killed, the first line that the command cannot write ends it.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        show: Callable[[str], object],
        when_ended: "Callable[[BackgroundProcess], object]",
    ) -> None:
        self.name = name
        self._error: str | None = None
        self._show, self._when_ended = show, when_ended
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
        """Why it failed, by its own error line where it printed one; None: it ended well."""
        code = self._process.wait()
        if code < 0:
            hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
            return f"killed by {signal_name(-code)}{hint}"
        return (self._error or f"exit code {code}, see above") if code else None

    def stop(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def wait_for_end(self) -> None:
        """Wait until it has cleaned up; kill it after a minute."""
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _follow(self) -> None:
        assert self._process.stdout
        assert self._process.stderr
        errors = threading.Thread(target=_relay, args=(self._process.stderr, self._show_error), daemon=True)
        errors.start()
        _relay(self._process.stdout, lambda line: print(line, flush=True))
        errors.join()
        self._process.wait()
        self._when_ended(self)

    def _show_error(self, line: str) -> None:
        if line.startswith(ERROR):
            self._error = line.removeprefix(ERROR)
        self._show(line)


def _relay(stream: IO[str], show: Callable[[str], object]) -> None:
    """Show each line of a stream. When our own output is closed, the stream is closed too, which ends its writer."""
    with stream:
        for line in stream:
            try:
                with _printing:
                    show(line.rstrip("\n"))
            except (OSError, SystemExit):  # rich makes the latter of a broken pipe
                return


@dataclass(frozen=True)
class Limits:
    """What one request to a `LimitedWorker` may take."""

    memory_bytes: int = 2**28
    """Beyond what the process holds when the request comes."""
    cpu_s: int = 5
    wall_s: float = 20.0
    answer_bytes: int = 2**22

    @property
    def late(self) -> str:
        """The error for an answer that takes too much time of either kind."""
        return f"did not end within {self.cpu_s} s of work"

    @property
    def large(self) -> str:
        """The error for an answer that takes too much memory."""
        return f"took more than {self.memory_bytes >> 20} MB"


class LimitError(Exception):
    """A request that failed or took too much, in one line."""


class LimitedWorker:
    """A child that answers requests (JSON) with texts, by the function `answer` of a script, each within limits.

    It starts with the first request, stays for the next ones, and ends with this process or with an error.
    """

    def __init__(self, script: Path) -> None:
        self._command = (sys.executable, "-P", __file__, str(script))
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any], limits: Limits) -> str:
        """The answer. Raises LimitError: it raised, crashed, or took too much memory, time or space."""
        child = self._running()
        try:
            line = _exchange(child, json.dumps({"request": request, "limits": asdict(limits)}).encode(), limits)
            answer = json.loads(line)
            if "error" in answer:
                raise LimitError(answer["error"])
        except ValueError:
            self.close()
            code = child.returncode
            if code == -signal.SIGXCPU:
                raise LimitError(limits.late) from None
            ending = signal_name(-code) if code < 0 else f"exit {code}"
            raise LimitError(f"ended without an answer ({ending})") from None
        except BaseException:
            self.close()
            raise
        return str(answer["text"])

    def close(self) -> None:
        """End the child."""
        if self._child:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            atexit.register(self.close)
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us
            )
        return self._child


def _exchange(child: subprocess.Popen[bytes], request: bytes, limits: Limits) -> bytes:
    """The line that answers a request, or its beginning where the child ends. Raises LimitError."""
    assert child.stdin
    assert child.stdout
    with suppress(BrokenPipeError):
        child.stdin.write(request + b"\n")
        child.stdin.flush()
    deadline, line = time.monotonic() + limits.wall_s, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([child.stdout], [], [], _LOOK_S)
        if not ready:
            if _resident_bytes(child.pid) > _ROOM_BESIDE * limits.memory_bytes:
                raise LimitError(limits.large)
            if time.monotonic() >= deadline:
                raise LimitError(limits.late)
            continue
        part = os.read(child.stdout.fileno(), 2**16)
        if not part:
            break
        line += part
        if len(line) > limits.answer_bytes:
            raise LimitError(f"gave more than {limits.answer_bytes >> 20} MB")
    return line


def _resident_bytes(pid: int) -> int:
    with suppress(psutil.Error):  # it has ended
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def _serve(answer: Callable[[Any], str]) -> None:
    """The child: one line per request, one line per answer, until stdin ends, as it does when the parent ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print must not be taken for an answer
        for line in sys.stdin:
            given = json.loads(line)
            limits = Limits(**given["limits"])
            try:
                _limit_this_process(limits)
                text = json.dumps({"text": answer(given["request"])})
            except MemoryError:
                text = json.dumps({"error": limits.large})
            except Exception as error:
                text = json.dumps({"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]})
            print(text, file=answers, flush=True)


def _limit_this_process(limits: Limits) -> None:
    """Limit memory, processor time and core files from now on. macOS ignores the first; the parent looks at it too."""
    most_bytes = psutil.Process().memory_info().vms + limits.memory_bytes
    most_s = math.ceil(time.process_time()) + limits.cpu_s
    for kind, value in ((resource.RLIMIT_AS, most_bytes), (resource.RLIMIT_CPU, most_s), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    _serve(runpy.run_path(sys.argv[1])["answer"])
