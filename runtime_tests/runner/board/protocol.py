"""The runner protocol of docs/runner.md for a session in Python. Goes to the device: needs Python 3.9 and numpy alone.

Knows neither format nor runtime; those are in the file beside it that calls `main`.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

MOST = 10**9
DIGITS = 1000
"""Longer numbers are refused unread: Python raises an error of its own for them."""
MOST_THREADS = 1024
USAGE, LOAD, RUN = ("usage", 2), ("load", 3), ("run", 4)


class Session(Protocol):
    """One loaded artifact with one KV cache."""

    threads: int
    vocab_size: int
    context_length: int

    def reset(self) -> None:
        """Empty the cache."""

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Continue the cache; logits [V] after the last token."""


OpenSession = Callable[[Path, "int | None"], Session]


class Failure(Exception):  # noqa: N818 – what the protocol calls it
    """One line of error and the stage it belongs to."""

    def __init__(self, stage: tuple[str, int], text: object) -> None:
        super().__init__(" ".join(str(text).split()))
        self.stage = stage


class LogitsFile:
    """Rows of float32 as they come, and their CRC-32."""

    def __init__(self, path: str | None) -> None:
        self.rows, self.crc32 = 0, 0
        try:
            # unbuffered: an error belongs to the row that could not be written
            self.file = Path(path).open("wb", buffering=0) if path else None  # noqa: SIM115 – closed by close()
        except OSError as error:
            raise Failure(RUN, f"cannot write {path}: {error.strerror}") from None

    def add(self, logits: NDArray[np.float32]) -> None:
        assert self.file is not None  # the script was checked
        data = np.ascontiguousarray(logits, "<f4").tobytes()
        self.rows, self.crc32 = self.rows + 1, zlib.crc32(data, self.crc32)
        left = memoryview(data)
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise Failure(RUN, f"cannot write {self.file.name}: {error.strerror}") from None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class Run:
    """One script on one session."""

    def __init__(self, session: Session, logits_file: LogitsFile) -> None:
        self.session, self.logits_file = session, logits_file
        self.length = 0
        self.last: NDArray[np.float32] = np.empty(0, np.float32)
        self.feeds: list[dict[str, int]] = []
        self.generated: list[dict[str, list[int]]] = []
        self.top: list[list[list[Any]]] = []

    def step(self, name: str, numbers: list[int]) -> None:
        """Do one command."""
        if name == "reset":
            self.length = 0
            self.session.reset()
        elif name == "feed":
            self.feeds.append({"tokens": len(numbers), "ns": self.feed(numbers)})
        elif name == "generate":
            made: dict[str, list[int]] = {"tokens": [], "ns": []}
            for _ in range(numbers[0]):
                made["tokens"].append(int(self.last.argmax()))
                made["ns"].append(self.feed(made["tokens"][-1:]))
            self.generated.append(made)
        elif name == "logits":
            self.logits_file.add(self.last)
        else:
            self.top.append(self.largest(numbers[0]))

    def feed(self, tokens: Sequence[int]) -> int:
        """Nanoseconds of one step, tokens in to logits out."""
        context, vocab = self.session.context_length, self.session.vocab_size
        if self.length + len(tokens) > context:
            raise Failure(RUN, f"{len(tokens)} tokens at position {self.length}: the context holds {context}")
        if max(tokens) >= vocab:
            raise Failure(RUN, f"token {max(tokens)}: the vocabulary has {vocab}")
        started = time.perf_counter_ns()
        self.last = self.session.feed(tokens)
        taken = time.perf_counter_ns() - started
        self.length += len(tokens)
        return taken

    def largest(self, count: int) -> list[list[Any]]:
        """Token and logit, largest first."""
        if count > len(self.last):
            raise Failure(RUN, f"top {count}: the vocabulary has {len(self.last)}")
        order = np.argsort(-self.last, kind="stable")[:count]
        return [[int(i), float(self.last[i]) if np.isfinite(self.last[i]) else None] for i in order]


def parse(text: str, with_logits: bool) -> list[tuple[str, list[int]]]:
    """A script as (name, numbers), checked as a whole."""
    commands, answered = [], False
    for number, line in enumerate(text[:-1].split("\n") if text.endswith("\n") else text.split("\n"), 1):
        name, *words = line.split(" ")
        numbers = [int(word) for word in words if word.isascii() and word.isdigit() and len(word) <= DIGITS]
        counts = {"reset": not words, "logits": not words, "feed": bool(words), "generate": len(words) == 1}
        good = counts.get(name, name == "top" and len(words) == 1)
        good = good and len(numbers) == len(words) and max(numbers, default=0) <= MOST
        if not good or (name in ("generate", "top") and numbers[0] < 1):
            raise Failure(USAGE, f"script line {number}: no command: {line[:80]!r}")
        if name in ("generate", "logits", "top") and not answered:
            raise Failure(USAGE, f"script line {number}: there are no logits before a feed")
        if name == "logits" and not with_logits:
            raise Failure(USAGE, f"script line {number}: logits need --logits FILE")
        answered = name != "reset" and (answered or name == "feed")
        commands.append((name, numbers))
    return commands


def threads(text: str) -> int:
    """The value of --threads."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_THREADS):
        raise argparse.ArgumentTypeError(f"takes 1 to {MOST_THREADS}, not {text!r}")
    return int(text)


def file_name(text: str) -> str:
    """The value of --logits."""
    if not text:
        raise argparse.ArgumentTypeError("needs a value")
    return text


class Arguments(argparse.ArgumentParser):
    """Wrong usage is an answer too, and the usage of every runner is the same."""

    def error(self, message: str) -> NoReturn:
        raise Failure(USAGE, message)


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def answer(runner: str, runtime: str, open_session: OpenSession) -> dict[str, Any]:
    """Do what the arguments say; the JSON object of a good end."""
    arguments = Arguments(prog="runner", add_help=False, allow_abbrev=False)
    arguments.add_argument("model")
    arguments.add_argument("script")
    arguments.add_argument("--threads", type=threads)
    arguments.add_argument("--logits", type=file_name)
    given = arguments.parse_args()
    try:
        text = Path(given.script).read_bytes().decode("ascii", "replace")
    except OSError as error:
        raise Failure(USAGE, f"cannot read the script {given.script}: {error.strerror}") from None
    commands = parse(text, bool(given.logits))
    before, started = memory("VmRSS:"), time.perf_counter_ns()
    try:
        session = open_session(Path(given.model), given.threads)
    except Exception as error:
        raise Failure(LOAD, f"{given.model}: {error}") from None
    load_ns = time.perf_counter_ns() - started
    logits_file = LogitsFile(given.logits)
    run = Run(session, logits_file)
    for command in commands:
        run.step(*command)
    logits_file.close()
    return {
        "runner": runner,
        "runtime": runtime,
        "threads": session.threads,
        "vocab_size": session.vocab_size,
        "context_length": session.context_length,
        "load_ns": load_ns,
        "feeds": run.feeds,
        "generated": run.generated,
        "top": run.top,
        "logits_rows": logits_file.rows,
        "logits_crc32": f"{logits_file.crc32:08x}",
        "rss_before_load_bytes": before,
        "peak_rss_bytes": memory("VmHWM:"),
    }


def main(runner: str, runtime: str, open_session: OpenSession) -> int:
    """Print the answer, or the error, as the last line; the exit status."""
    try:
        text: dict[str, Any] = answer(runner, runtime, open_session)
        status = 0
    except Failure as failure:
        text, status = {"error": str(failure), "stage": failure.stage[0]}, failure.stage[1]
    except Exception as error:  # a runtime's error is an answer, a traceback is none
        text, status = {"error": " ".join(f"{type(error).__name__}: {error}".split()), "stage": "run"}, RUN[1]
    print("\n" + json.dumps(text), flush=True)
    return status
