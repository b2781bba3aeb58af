"""A .pte through our C++ runner, timed by the runner itself; each pass is a process of its own.

Before the timed pass a process warms up as the other runners do: the same prompt, once, not counted.
"""

import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from export import manifest
from export.formats import size
from export.manifest import IOContract
from runtime_tests.device_runner import (
    Answer,
    Command,
    Feed,
    Generate,
    Logits,
    Reset,
    Restore,
    Rewind,
    RunnerFailure,
    parse_answer,
    read_logits,
    write_script,
)
from runtime_tests.device_runner.build import build
from runtime_tests.device_runner.compilers import host_abi
from runtime_tests.jobs import Opening
from runtime_tests.sessions import Session, saved

from . import DROPPED, Pass, Runner

_WARM_UP = 8


class _Filled:
    """What is saved of a session, with any numbers in its slots: near 0.05 in float32 and bfloat16."""

    def __init__(self, contract: IOContract, length: int) -> None:
        self.tokens, self.left, self.oldest, self.states = [0] * length, (), 0, contract.states

    def buffers(self) -> dict[str, NDArray[np.uint8]]:
        """By name, [slots, bytes]."""
        slots = len(self.tokens)
        return {s.name: np.full((slots, size(s.dtype, map(int, s.shape[2:]))), 0x3D, np.uint8) for s in self.states}


class _DeviceRunner(Runner):
    """The runner that devices use, built for this machine."""

    def __init__(self, path: str, threads: int) -> None:
        bundle = build(host_abi())
        self.command = (str(bundle.path / bundle.start[0]), str(Path(path).absolute()))
        self.threads = threads
        self.peak = 0
        self.run([Reset(), Feed((0,))])

    def run(self, script: Sequence[Command], folder: str | None = None) -> tuple[Answer, NDArray[np.float32]]:
        """A script in a process of its own: the answer, and the logits it asks for [R, V]. Raises RuntimeError.

        Sessions that it names lie in `folder`.
        """
        with tempfile.TemporaryDirectory() as scratch:
            text, logits = Path(scratch) / "script", Path(scratch) / "logits"
            write_script(script, text)
            options = ("--threads", str(self.threads), "--logits", str(logits))
            done = subprocess.run([*self.command, str(text), *options], cwd=folder, capture_output=True, check=False)
            answer = parse_answer(done.stdout, done.returncode)
            if isinstance(answer, RunnerFailure):
                raise RuntimeError(f"{answer.stage}: {answer.error}")
            self.peak = max(self.peak, answer.peak_rss_bytes)
            return answer, np.array(read_logits(logits, answer))

    def prompt(self, tokens: Sequence[int]) -> Pass:
        answer, _ = self.run([Reset(), Feed(tuple(tokens))] * 2)
        return Pass(len(tokens), answer.feeds[-1].ns)

    def generate(self, tokens: Sequence[int], count: int) -> Pass:
        start: list[Command] = [Reset(), Feed(tuple(tokens))]
        answer, _ = self.run([*start, Generate(_WARM_UP), *start, Generate(count)])
        return Pass(count, sum(answer.generated[-1].ns))

    def logits(self, tokens: Sequence[int], prefill: int) -> NDArray[np.float32]:
        script: list[Command] = [Reset(), Feed(tuple(tokens[:prefill])), Logits()]
        for token in tokens[prefill:]:
            script += [Feed((token,)), Logits()]
        return self.run(script)[1]

    def decode_at(self, positions: Sequence[int], count: int) -> list[list[int]]:
        """From a saved session that was never fed."""
        folder, falling = Path(self.command[1]).parent, sorted(positions, reverse=True)
        with tempfile.TemporaryDirectory() as scratch:
            artifact = hashlib.sha256((folder / manifest.FILE).read_bytes()).digest()
            filled = _Filled(manifest.read(folder).contract, falling[0])
            saved.save(cast(Session, filled), Path(scratch) / "session", artifact)
            script: list[Command] = [Restore("session")]
            for position in falling:
                script += [Rewind(position), Feed((0,)), Generate(DROPPED - 1 + count)]
            answer, _ = self.run(script, scratch)
        times = dict(zip(falling, (made.ns[DROPPED - 1 :] for made in answer.generated), strict=True))
        return [list(times[position]) for position in positions]

    def peak_rss_bytes(self) -> int:
        return self.peak


def open_runner(opening: Opening) -> _DeviceRunner:
    """The C++ runner on a .pte."""
    return _DeviceRunner(opening.path, opening.threads)
