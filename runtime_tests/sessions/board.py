"""The runner protocol of docs/runner.md for any session in Python. Copied to devices: needs only Python 3.9 and numpy.

The module of a format's session, which is copied too, calls `main`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .base import ContextError, Session, TokenError
from .footprint import held_bytes, peak_bytes
from .saved import SavedError, restore, save

_MOST = 10**9
_DIGITS = 1000
"""Longer numbers are refused before `int`, which raises an error of its own for them."""
_MOST_THREADS = 1024
_COUNTED = ("rewind", "generate", "top")
USAGE, _LOAD, _RUN = ("usage", 2), ("load", 3), ("run", 4)
_OpenSession = Callable[[Path, Any, int], Session]
"""Loads the model at a path, with the contract of its manifest and a number of threads."""


class Failure(Exception):  # noqa: N818 – the name in the protocol
    """A one-line error and the stage in which it happened."""

    def __init__(self, stage: tuple[str, int], text: object) -> None:
        super().__init__(" ".join(str(text).split()))
        self.stage = stage


class _LogitsFile:
    """A file of float32 rows, and their CRC-32."""

    def __init__(self, path: str | None) -> None:
        self.rows, self.crc32 = 0, 0
        try:
            # unbuffered: an error belongs to the row that could not be written
            self.file = Path(path).open("wb", buffering=0) if path else None  # noqa: SIM115 – closed by close()
        except OSError as error:
            raise Failure(_RUN, f"cannot write {path}: {error.strerror}") from None

    def add(self, logits: NDArray[np.float32]) -> None:
        assert self.file is not None  # the script was checked
        data = np.ascontiguousarray(logits, "<f4").tobytes()
        self.rows, self.crc32 = self.rows + 1, zlib.crc32(data, self.crc32)
        left = memoryview(data)
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise Failure(_RUN, f"cannot write {self.file.name}: {error.strerror}") from None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class Run:
    """One script on one session."""

    def __init__(self, session: Session, logits_file: _LogitsFile, manifest: Path) -> None:
        self.session, self.logits_file, self.manifest = session, logits_file, manifest
        self.last: NDArray[np.float32] = np.empty(0, np.float32)
        self.feeds: list[dict[str, int]] = []
        self.generated: list[dict[str, list[int]]] = []
        self.top: list[list[list[Any]]] = []
        self.saved: list[int] = []

    def step(self, name: str, numbers: list[int], file: str) -> None:
        """Execute one command."""
        if name == "reset":
            self.session.reset()
        elif name in ("rewind", "save", "restore"):
            self.move(name, numbers, Path(file))
        elif name == "feed":
            self.feeds.append({"tokens": len(numbers), "ns": self.feed(numbers)})
        elif name == "generate":
            generation: dict[str, list[int]] = {"tokens": [], "ns": []}
            for _ in range(numbers[0]):
                generation["tokens"].append(int(self.last.argmax()))
                generation["ns"].append(self.feed(generation["tokens"][-1:]))
            self.generated.append(generation)
        elif name == "logits":
            self.logits_file.add(self.last)
        else:
            self.top.append(self.largest(numbers[0]))

    def move(self, name: str, numbers: list[int], file: Path) -> None:
        """Rewind, save or restore."""
        try:
            if name == "rewind":
                self.session.rewind(numbers[0])
                return
            artifact = hashlib.sha256(self.manifest.read_bytes()).digest()
            if name == "save":
                self.saved.append(save(self.session, file, artifact))
            else:
                restore(self.session, file, artifact)
        except (ContextError, SavedError) as error:
            raise Failure(_RUN, error) from None

    def feed(self, tokens: Sequence[int]) -> int:
        """Feed tokens; returns the nanoseconds from tokens to logits."""
        started = time.perf_counter_ns()
        try:
            self.last = self.session.feed(tokens)
        except (ContextError, TokenError) as error:
            raise Failure(_RUN, error) from None
        return time.perf_counter_ns() - started

    def largest(self, count: int) -> list[list[Any]]:
        """The largest logits as [token, logit], largest first; null for NaN and infinity."""
        if count > len(self.last):
            raise Failure(_RUN, f"top {count}: the vocabulary has {len(self.last)}")
        order = np.argsort(-self.last, kind="stable")[:count]
        return [[int(i), float(self.last[i]) if np.isfinite(self.last[i]) else None] for i in order]


def parse(text: str, with_logits: bool) -> list[tuple[str, list[int], str]]:
    """A script as (name, numbers, name of a file), checked as a whole."""
    commands, answered = [], False
    for number, line in enumerate(text[:-1].split("\n") if text.endswith("\n") else text.split("\n"), 1):
        name, *words = line.split(" ")
        file = words.pop() if name in ("save", "restore") and len(words) == 1 else ""
        numbers = [int(word) for word in words if word.isascii() and word.isdigit() and len(word) <= _DIGITS]
        counts = {"reset": not words, "logits": not words, "feed": bool(words), "save": not words, "restore": not words}
        good = counts.get(name, name in _COUNTED and len(words) == 1)
        good = good and len(numbers) == len(words) and max(numbers, default=0) <= _MOST
        good = good and (name not in ("save", "restore") or (file > "" and all("!" <= c <= "~" for c in file)))
        if not good or (name in _COUNTED and numbers[0] < 1):
            raise Failure(USAGE, f"script line {number}: no command: {line[:80]!r}")
        if name in ("generate", "logits", "top") and not answered:
            raise Failure(USAGE, f"script line {number}: there are no logits before a feed")
        if name == "logits" and not with_logits:
            raise Failure(USAGE, f"script line {number}: logits need --logits FILE")
        answered = name not in ("reset", "rewind", "restore") and (answered or name == "feed")
        commands.append((name, numbers, file))
    return commands


def threads(text: str) -> int:
    """The value of --threads."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _MOST_THREADS):
        raise argparse.ArgumentTypeError(f"takes 1 to {_MOST_THREADS}, not {text!r}")
    return int(text)


def _file_name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("needs a value")
    return text


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are answers of the protocol."""

    def error(self, message: str) -> NoReturn:
        raise Failure(USAGE, message)


def _manifest_beside(model: Path) -> Any:
    """The artifact's manifest.json with its fields as attributes, like `export.manifest.Manifest` on the host."""
    text = (model.parent / "manifest.json").read_text(encoding="utf-8")
    return json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))


def answer(runner: str, runtime: str, open_session: _OpenSession) -> dict[str, Any]:
    """Execute the script that the command line names; the JSON object of a success. Raises Failure."""
    arguments = Arguments(prog="runner", add_help=False, allow_abbrev=False)
    arguments.add_argument("model")
    arguments.add_argument("script")
    arguments.add_argument("--threads", type=threads)
    arguments.add_argument("--logits", type=_file_name)
    options = arguments.parse_args()
    try:
        text = Path(options.script).read_bytes().decode("ascii", "replace")
    except OSError as error:
        raise Failure(USAGE, f"cannot read the script {options.script}: {error.strerror}") from None
    commands = parse(text, bool(options.logits))
    before, started = held_bytes(), time.perf_counter_ns()
    thread_count = options.threads or os.cpu_count() or 1
    try:
        described = _manifest_beside(Path(options.model))
        session = open_session(Path(options.model), described.contract, thread_count)
    except Exception as error:
        raise Failure(_LOAD, f"{options.model}: {error}") from None
    load_ns = time.perf_counter_ns() - started
    logits_file = _LogitsFile(options.logits)
    run = Run(session, logits_file, Path(options.model).parent / "manifest.json")
    for command in commands:
        run.step(*command)
    logits_file.close()
    return {
        "runner": runner,
        "runtime": runtime,
        "threads": thread_count,
        "vocab_size": session.vocab_size,
        "context_length": session.context_length,
        "load_ns": load_ns,
        "feeds": run.feeds,
        "generated": run.generated,
        "top": run.top,
        "saved": run.saved,
        "logits_rows": logits_file.rows,
        "logits_crc32": f"{logits_file.crc32:08x}",
        "rss_before_load_bytes": before,
        "peak_rss_bytes": peak_bytes(),
    }


def main(runner: str, runtime: str, open_session: _OpenSession) -> int:
    """Print the answer or the error as the last line; returns the exit status."""
    try:
        text: dict[str, Any] = answer(runner, runtime, open_session)
        status = 0
    except Failure as failure:
        text, status = {"error": str(failure), "stage": failure.stage[0]}, failure.stage[1]
    except Exception as error:  # the host parses an answer, not a traceback
        text, status = {"error": " ".join(f"{type(error).__name__}: {error}".split()), "stage": "run"}, _RUN[1]
    print("\n" + json.dumps(text), flush=True)
    return status
