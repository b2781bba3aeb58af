"""The runner protocol of docs/runner.md, as the host speaks it: commands → script, a process's output → answer.

A module named like a session brings that session's runner to a device. `cpp/` is the runner for `.pte`, `build` makes
it; the others are the Python sessions themselves.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import devices
from devices import Device, Transport, visible
from export.errors import ExportError
from export.host.processes import signal_name
from runtime_tests.sessions import board

from . import complaints

_STAGES: dict[int, str] = {2: "usage", 3: "load", 4: "run"}
_SIGNALLED = 128
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Positive = Annotated[int, Field(gt=0, lt=2**63)]


@dataclass(frozen=True)
class Reset:
    """Empty the KV cache."""


@dataclass(frozen=True)
class Rewind:
    """Forget all but the first `length` tokens."""

    length: int


@dataclass(frozen=True)
class Feed:
    """Continue the cache with these tokens."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Generate:
    """Feed the most likely token `count` times."""

    count: int


@dataclass(frozen=True)
class Logits:
    """Append the logits of the last fed token to the file."""


@dataclass(frozen=True)
class Top:
    """Report the `count` largest logits of the last fed token."""

    count: int


@dataclass(frozen=True)
class Save:
    """Write the filled cache to a file there."""

    file: str


@dataclass(frozen=True)
class Restore:
    """Fill the cache from a file there."""

    file: str


Command = Reset | Rewind | Feed | Generate | Logits | Top | Save | Restore


def script_text(commands: Iterable[Command]) -> str:
    """The script of these commands; ValueError for what a runner would refuse."""
    text = "".join(f"{_line(command)}\n" for command in commands)
    try:
        board.parse(text, with_logits=True)
    except board.Failure as failure:
        raise ValueError(str(failure)) from None
    return text


def write_script(commands: Iterable[Command], path: Path) -> None:
    """Write the script of these commands to a file."""
    path.write_text(script_text(commands), encoding="ascii", newline="\n")


def _line(command: Command) -> str:
    """Its name, then the numbers or the word of its one field."""
    (values,) = vars(command).values() or ((),)
    words = map(str, values if isinstance(values, tuple) else (values,))
    return " ".join([type(command).__name__.lower(), *words])


_LONGEST = 300
"""Characters of a runner's error."""
_Time = Annotated[int, Field(gt=0, lt=10**15)]
"""Nanoseconds: rates are computed from it."""


class _Record(BaseModel):
    """Exactly the documented keys with exactly the documented types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Fed(_Record):
    """One `feed`."""

    tokens: _Positive
    ns: _Time


class _Generated(_Record):
    """One `generate`: each token fed and its time."""

    tokens: tuple[_Count, ...]
    ns: tuple[_Time, ...]

    @model_validator(mode="after")
    def _one_time_each(self) -> Self:
        if len(self.tokens) != len(self.ns):
            raise ValueError(f"{len(self.tokens)} tokens with {len(self.ns)} times")
        return self


class Answer(_Record):
    """The object that a runner prints after a run without errors."""

    runner: str
    runtime: str
    threads: _Positive
    vocab_size: _Positive
    context_length: _Positive
    load_ns: _Time
    feeds: tuple[_Fed, ...]
    generated: tuple[_Generated, ...]
    top: tuple[tuple[tuple[_Count, float | None], ...], ...]
    """Token and logit, largest first; None: not a finite number."""
    saved: tuple[_Positive, ...] = ()
    """Bytes of each saved session."""
    logits_rows: _Count
    logits_crc32: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    rss_before_load_bytes: _Count
    peak_rss_bytes: _Count


class RunnerFailure(_Record):
    """A run without an answer."""

    stage: Literal["usage", "load", "run", "crash", "protocol"]
    """`crash`: ended by a signal. `protocol`: its output does not fit its exit status."""
    error: str


class _ErrorLine(_Record):
    """The object that a runner prints when it fails."""

    error: str
    stage: Literal["usage", "load", "run"]


def parse_answer(stdout: bytes, returncode: int, stderr: bytes = b"") -> Answer | RunnerFailure:
    """Judge a finished process by its exit status, then by the last line it printed.

    Where that is no object, what it wrote to stderr tells why.
    """
    if returncode < 0 or returncode > _SIGNALLED:
        number = -returncode if returncode < 0 else returncode - _SIGNALLED
        return RunnerFailure(stage="crash", error=f"ended by {signal_name(number)}")
    line = (stdout.splitlines() or [b""])[-1]
    try:
        if returncode == 0:
            return Answer.model_validate_json(line)
        failed = _ErrorLine.model_validate_json(line)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "last line"
        text = f"exit status {returncode}, {key}: {problem['msg']}: {line[:80]!r}"
        if returncode and not line.startswith(b"{"):
            text = f"exit status {returncode}: {complaints.of(stderr.decode(errors='replace'), returncode)}"
        return RunnerFailure(stage="protocol", error=text)
    if _STAGES.get(returncode) != failed.stage:
        text = f"exit status {returncode} with stage {failed.stage}: {failed.error}"
        return RunnerFailure(stage="protocol", error=text)
    return RunnerFailure(stage=failed.stage, error=visible(failed.error)[:_LONGEST])


def fitting(answer: Answer, commands: Sequence[Command], vocab_size: int) -> Answer:
    """The answer to these commands. Raises ValueError: it is one to others, or of another model."""
    asked = {
        "feeds": [len(command.tokens) for command in commands if isinstance(command, Feed)],
        "generated": [command.count for command in commands if isinstance(command, Generate)],
        "top": sum(isinstance(command, Top) for command in commands),
        "saved": sum(isinstance(command, Save) for command in commands),
        "logits_rows": sum(isinstance(command, Logits) for command in commands),
        "vocab_size": vocab_size,
        "generated tokens outside the vocabulary": 0,
    }
    told = {
        "feeds": [feed.tokens for feed in answer.feeds],
        "generated": [len(generated.tokens) for generated in answer.generated],
        "top": len(answer.top),
        "saved": len(answer.saved),
        "logits_rows": answer.logits_rows,
        "vocab_size": answer.vocab_size,
        "generated tokens outside the vocabulary": sum(
            token >= vocab_size for generated in answer.generated for token in generated.tokens
        ),
    }
    if wrong := [name for name in asked if told[name] != asked[name]]:
        raise ValueError(f"its answer is not to this script: {', '.join(wrong)} differ")
    return answer


def read_logits(path: Path, answer: Answer) -> NDArray[np.float32]:
    """The rows [R, V] that came with an answer; ValueError if they are not those that the runner wrote."""
    data = path.read_bytes()
    expected = answer.logits_rows * answer.vocab_size * 4
    if len(data) != expected:
        raise ValueError(f"{path}: {len(data)} bytes; the runner wrote {expected}")
    if (crc32 := f"{zlib.crc32(data):08x}") != answer.logits_crc32:
        raise ValueError(f"{path}: CRC-32 {crc32}; the runner wrote {answer.logits_crc32}")
    return np.frombuffer(data, "<f4").reshape(answer.logits_rows, answer.vocab_size)


def start_failure(transport: Transport, start: Sequence[str], *, timeout_s: float) -> str | None:
    """Why a runner does not start there; None: it does, for without a model it answers with an error of usage."""
    ended = transport.run(start, timeout_s=timeout_s)
    answer = parse_answer(ended.stdout, ended.returncode, ended.stderr)
    return answer.error if isinstance(answer, RunnerFailure) and answer.stage != "usage" else None


def started(transport: Transport, device: Device, start: tuple[str, ...], *, timeout_s: float) -> tuple[str, ...]:
    """The command `start`, tried once. Raises ExportError in the device's own words."""
    if reason := start_failure(transport, start, timeout_s=timeout_s):
        raise ExportError(f"{device.name}: the runner does not start there: {reason}")
    return start


def file_of_own_runner(device: Device) -> Path:
    """The `runner` of the device's YAML. Raises ExportError: no such file."""
    assert device.runner is not None
    path = devices.file_of(device.name).parents[1] / device.runner
    if not path.is_file():
        raise ExportError(f"devices/{device.name}.yaml: runner: no file {path}; build it first, or set it to null")
    return path


def own_runner(transport: Transport, device: Device, timeout_s: float) -> tuple[str, ...]:
    """Push the `runner` of the device's YAML; a relative path starts at the folder that `devices` lies in."""
    path = file_of_own_runner(device)
    remote = f"runners/{path.name}"
    transport.push(path, remote, timeout_s=timeout_s)
    return (remote,)
