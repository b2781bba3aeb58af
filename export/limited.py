"""Run a foreign program's text work in a child with little memory and time. Knows nothing of what it does."""

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from .errors import ExportError

MEMORY_BYTES = 2**28
"""Beyond what the process has when it forks."""
CPU_S = 5
WALL_S = 20.0
MAX_ANSWER_BYTES = 2**22


def call(what: str, function: Callable[[], str]) -> str:
    """What `function` returns, computed in a fork of this process, which costs milliseconds.

    Raises ExportError, one line that begins with `what`: it raised, crashed, or took too much memory, time or space.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        answer_and_exit(writer, function)
    os.close(writer)
    try:
        data = read_all(reader, time.monotonic() + WALL_S)
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if data is None or code == -signal.SIGXCPU:
        raise ExportError(f"{what}: did not end within {CPU_S} s of work")
    if len(data) > MAX_ANSWER_BYTES:
        raise ExportError(f"{what}: gave more than {MAX_ANSWER_BYTES >> 20} MB")
    try:
        answer = json.loads(data)
    except ValueError:
        raise ExportError(f"{what}: ended without an answer ({ended(code)})") from None
    if "error" in answer:
        raise ExportError(f"{what}: {answer['error']}")
    return str(answer["text"])


def ended(code: int) -> str:
    """An exit code or a signal, by name."""
    return signal.Signals(-code).name if code < 0 else f"exit {code}"


def answer_and_exit(writer: int, function: Callable[[], str]) -> None:
    """The child: nothing of the parent's is flushed, closed or run at its end."""
    try:
        limit()
        answer = {"text": function()}
    except MemoryError:
        answer = {"error": f"took more than {MEMORY_BYTES >> 20} MB"}
    except BaseException as error:
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    with suppress(BaseException):
        with open(writer, "wb", closefd=False) as pipe:
            pipe.write(json.dumps(answer).encode())
        os._exit(0)
    os._exit(1)


def limit() -> None:
    """Memory, processor time and core files of this process. macOS does not keep the first; time ends it there."""
    most = psutil.Process().memory_info().vms + MEMORY_BYTES
    for kind, value in ((resource.RLIMIT_AS, most), (resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def read_all(reader: int, deadline: float) -> bytes | None:
    """Everything until the other end closes, or a little more than is allowed; None when the time is over."""
    data = b""
    while len(data) <= MAX_ANSWER_BYTES:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(reader, 2**16)
        if not part:
            break
        data += part
    return data
