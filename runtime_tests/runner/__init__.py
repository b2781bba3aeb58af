"""The runner protocol of docs/runner.md: commands to a script, a process's answer to a value. Knows no device.

The C++ sources beside this file are one implementation of it, `build` makes that one.
"""

import signal
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

MOST = 10**9
DIGITS = 1000
"""Python refuses to read numbers of many more digits with an error of its own."""
STAGES: dict[int, str] = {2: "usage", 3: "load", 4: "run"}
SIGNALLED = 128


@dataclass(frozen=True)
class Reset:
    """Empty the KV cache."""


@dataclass(frozen=True)
class Feed:
    """Continue the cache with these tokens."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Generate:
    """Feed the most likely token so many times."""

    count: int


@dataclass(frozen=True)
class Logits:
    """Append the logits of the last fed token to the file."""


@dataclass(frozen=True)
class Top:
    """Keep so many of the largest logits of the last fed token."""

    count: int


Command = Reset | Feed | Generate | Logits | Top
NAMES: dict[type, str] = {Reset: "reset", Feed: "feed", Generate: "generate", Logits: "logits", Top: "top"}


def script_text(commands: Iterable[Command]) -> str:
    """The script of some commands; ValueError for what a runner would refuse."""
    text = "".join(f"{' '.join([NAMES[type(c)], *map(str, numbers(c))])}\n" for c in commands)
    parse_script(text)
    return text


def write_script(commands: Iterable[Command], path: Path) -> None:
    """Write a script a runner can read."""
    path.write_text(script_text(commands), encoding="ascii", newline="\n")


def numbers(command: Command) -> tuple[int, ...]:
    """What stands after a command's name."""
    match command:
        case Feed(tokens):
            return tokens
        case Generate(count) | Top(count):
            return (count,)
        case _:
            return ()


def parse_script(text: str) -> list[Command]:
    """The commands of a script; ValueError names the first bad line."""
    commands: list[Command] = []
    answered = False
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        command = parse_line(number, line)
        if not isinstance(command, Feed | Reset) and not answered:
            raise ValueError(f"script line {number}: there are no logits before a feed")
        answered = not isinstance(command, Reset) and (answered or isinstance(command, Feed))
        commands.append(command)
    return commands


def parse_line(number: int, line: str) -> Command:
    """One command; words are separated by single spaces."""
    name, *words = line.split(" ")
    if not all(word.isascii() and word.isdigit() and len(word) <= DIGITS and int(word) <= MOST for word in words):
        raise ValueError(f"script line {number}: not numbers from 0 to {MOST}: {line[:80]!r}")
    values = tuple(map(int, words))
    match name, values:
        case "reset", ():
            return Reset()
        case "logits", ():
            return Logits()
        case "feed", (_, *_):
            return Feed(values)
        case "generate", (count,) if count > 0:
            return Generate(count)
        case "top", (count,) if count > 0:
            return Top(count)
    raise ValueError(f"script line {number}: no command: {line[:80]!r}")


class Record(BaseModel):
    """Exactly the documented keys with exactly the documented types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Fed(Record):
    """One `feed`."""

    tokens: PositiveInt
    ns: NonNegativeInt


class Generated(Record):
    """One `generate`: each token fed and its time."""

    tokens: tuple[NonNegativeInt, ...]
    ns: tuple[NonNegativeInt, ...]

    @model_validator(mode="after")
    def _one_time_each(self) -> Self:
        if len(self.tokens) != len(self.ns):
            raise ValueError(f"{len(self.tokens)} tokens with {len(self.ns)} times")
        return self


class Answer(Record):
    """What a runner prints when all went well."""

    runner: str
    runtime: str
    threads: PositiveInt
    vocab_size: PositiveInt
    context_length: PositiveInt
    load_ns: NonNegativeInt
    feeds: tuple[Fed, ...]
    generated: tuple[Generated, ...]
    top: tuple[tuple[tuple[NonNegativeInt, float | None], ...], ...]
    """Token and logit, largest first; None: not a finite number."""
    logits_rows: NonNegativeInt
    logits_crc32: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    rss_before_load_bytes: NonNegativeInt
    peak_rss_bytes: NonNegativeInt


class RunnerFailure(Record):
    """A run that gave no answer."""

    stage: Literal["usage", "load", "run", "crash", "protocol"]
    """`crash`: ended by a signal. `protocol`: what it printed is not what its exit status promises."""
    error: str


class ErrorLine(Record):
    """The object a runner prints when it fails."""

    error: str
    stage: Literal["usage", "load", "run"]


def parse_answer(stdout: bytes, returncode: int) -> Answer | RunnerFailure:
    """Judge a finished process by its exit status, then by the last line it printed."""
    if returncode < 0 or returncode > SIGNALLED:
        number = -returncode if returncode < 0 else returncode - SIGNALLED
        return RunnerFailure(stage="crash", error=f"ended by {signal_name(number)}")
    line = (stdout.splitlines() or [b""])[-1]
    try:
        if returncode == 0:
            return Answer.model_validate_json(line)
        failed = ErrorLine.model_validate_json(line)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "last line"
        return broken(f"exit status {returncode}, {where}: {problem['msg']}: {line[:80]!r}")
    if STAGES.get(returncode) != failed.stage:
        return broken(f"exit status {returncode} with stage {failed.stage}: {failed.error}")
    return RunnerFailure(stage=failed.stage, error=failed.error)


def broken(why: str) -> RunnerFailure:
    """A runner that does not keep to the protocol."""
    return RunnerFailure(stage="protocol", error=why)


def signal_name(number: int) -> str:
    """`SIGSEGV` for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_logits(path: Path, answer: Answer) -> NDArray[np.float32]:
    """The rows [R, V] that came with an answer; ValueError if they are not the ones the runner wrote."""
    data = path.read_bytes()
    expected = answer.logits_rows * answer.vocab_size * 4
    if len(data) != expected:
        raise ValueError(f"{path}: {len(data)} bytes; the runner wrote {expected}")
    if (found := f"{zlib.crc32(data):08x}") != answer.logits_crc32:
        raise ValueError(f"{path}: CRC-32 {found}; the runner wrote {answer.logits_crc32}")
    return np.frombuffer(data, "<f4").reshape(answer.logits_rows, answer.vocab_size)
