"""A .pte through our C++ runner, timed by the runner itself; each pass is a process of its own.

Before the timed pass a process warms up as the other runners do: the same prompt, once, not counted.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime_tests.device_runner import (
    Answer,
    Command,
    Feed,
    Generate,
    Logits,
    Reset,
    RunnerFailure,
    parse_answer,
    read_logits,
    write_script,
)
from runtime_tests.device_runner.build import build, timing_program
from runtime_tests.device_runner.compilers import host_abi
from runtime_tests.jobs import Opening

from . import Pass, Runner

_WARM_UP = 8


class _DeviceRunner(Runner):
    """The runner that devices use, built for this machine."""

    def __init__(self, path: str, threads: int) -> None:
        bundle = build(host_abi())
        self.command = (str(bundle.path / bundle.start[0]), path)
        self.threads = threads
        self.peak = 0
        self.run([Reset(), Feed((0,))])

    def run(self, script: Sequence[Command]) -> tuple[Answer, NDArray[np.float32]]:
        """A script in a process of its own: the answer, and the logits it asks for [R, V]. Raises RuntimeError."""
        with tempfile.TemporaryDirectory() as scratch:
            text, logits = Path(scratch) / "script", Path(scratch) / "logits"
            write_script(script, text)
            options = ("--threads", str(self.threads), "--logits", str(logits))
            done = subprocess.run([*self.command, str(text), *options], capture_output=True, check=False)
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
        numbers = map(str, (self.threads, count, *positions))
        done = subprocess.run(
            [timing_program(), self.command[1], *numbers], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"timing: {done.stderr.strip().splitlines()[-1]}")
        answer = json.loads(done.stdout)
        self.peak = max(self.peak, answer["peak_rss_bytes"])
        lists: list[list[int]] = answer["ns"]
        return lists

    def peak_rss_bytes(self) -> int:
        return self.peak


def open_runner(opening: Opening) -> _DeviceRunner:
    """The C++ runner on a .pte."""
    return _DeviceRunner(opening.path, opening.threads)
