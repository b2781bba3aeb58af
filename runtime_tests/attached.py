"""An attached device as a place: its runner and the artifact are pushed, scripts run there, answers come back.

Knows no format: what a target's artifact needs on a device is in the module of its session's name in `runner`.
"""

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from devices import DeadlineError, Device, DeviceError, DeviceLostError, NoSpaceError, Transport
from export import manifest
from export.errors import ExportError
from export.manifest import Manifest

from . import device_facts, on_runner
from .isolation import Ended, Progress
from .jobs import ConformanceJob, GenerateJob, LogitsJob, SpeedJob, Task
from .on_runner import RunnerStoppedError
from .place import ArtifactJob
from .record import DeviceState, Environment, Outcome
from .runner import Answer, Command, RunnerFailure, parse_answer, read_logits, write_script

ASK_S = 60.0
OUTCOMES = {"load": Outcome.LOAD_FAIL, "crash": Outcome.CRASH}


class RunnerModule(Protocol):
    """A module of `runtime_tests.runner` that brings one session's runner to devices."""

    def install(self, transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
        """Push the runner; the command that starts it in the working folder. Raises DeviceError, ExportError."""


class AttachedDevice:
    """One device, held for the length of a run."""

    attached = True

    def __init__(self, device: Device, transport: Transport, scratch: Path) -> None:
        self.device = device
        self.transport = transport
        self.scratch = scratch
        self.tools: dict[str, str] = {}
        self.installed: dict[str, tuple[tuple[str, ...], str]] = {}
        """By artifact folder: the command that starts the runner, and the model's path there."""
        self.abi = transport.abi()
        self.threads = device.threads or self.environment().cores

    def environment(self) -> Environment:
        return device_facts.environment(self._facts(), self.tools)

    def state(self) -> DeviceState:
        return device_facts.state(self._facts())

    def perform(self, job: ArtifactJob, *, limit_s: float, on_progress: Progress | None = None) -> Ended:
        try:
            return Ended(Outcome.PASS, "", self._perform(job, limit_s, on_progress))
        except RunnerStoppedError as stop:
            return Ended(stop.outcome, str(stop))
        except DeadlineError as error:
            return Ended(Outcome.TIMEOUT, str(error))
        except DeviceLostError as error:
            return Ended(Outcome.DEVICE_LOST, str(error))
        except NoSpaceError as error:
            return Ended(Outcome.DEVICE_FULL, str(error))
        except (DeviceError, ExportError) as error:
            return Ended(Outcome.RUN_FAIL, str(error))

    def _perform(self, job: ArtifactJob, limit_s: float, on_progress: Progress | None) -> dict[str, Any]:
        folder = Path(job.folder)
        described = manifest.read(folder)
        context_length = described.contract.kv.context_length

        def execute(commands: Sequence[Command]) -> tuple[Answer, NDArray[np.float32]]:
            return self._execute(folder, described, commands, limit_s)

        match job:
            case LogitsJob():
                for task in job.tasks:
                    self._write_logits(task, described, execute, on_progress)
                return {"tasks": len(job.tasks)}
            case GenerateJob():
                return on_runner.generate(job, execute)
            case ConformanceJob():
                return on_runner.conformance(job, context_length, execute)
            case SpeedJob():
                return on_runner.speed(job, context_length, execute)

    def _write_logits(
        self, task: Task, described: Manifest, execute: on_runner.Execute, on_progress: Progress | None
    ) -> None:
        """The logits of a task's windows, float32 [W, decode + 1, V]."""
        tokens = np.load(task.tokens)
        vocab, rows = described.architecture.vocab_size, tokens.shape[1] - task.prefill
        out = np.lib.format.open_memmap(task.out, mode="w+", dtype=np.float32, shape=(len(tokens), rows, vocab))
        for part, script in on_runner.window_scripts(tokens, task.prefill, vocab):
            out[part] = execute(script)[1].reshape(-1, rows, vocab)
            if on_progress:
                on_progress(part.stop, len(tokens))
        out.flush()

    def _execute(
        self, folder: Path, described: Manifest, commands: Sequence[Command], limit_s: float
    ) -> tuple[Answer, NDArray[np.float32]]:
        """Run a script in the artifact's runner; its answer and its logits."""
        start, model = self._install(folder, described, limit_s)
        with tempfile.TemporaryDirectory(dir=self.scratch) as local:
            script, logits = Path(local) / "script.txt", Path(local) / "logits.f32"
            write_script(commands, script)
            self.transport.push(script, "run/script.txt", timeout_s=ASK_S)
            argv = [*start, model, "run/script.txt", "--threads", str(self.threads), "--logits", "run/logits.f32"]
            ended = self.transport.run(argv, timeout_s=limit_s)
            answer = parse_answer(ended.stdout, ended.returncode)
            if isinstance(answer, RunnerFailure):
                raise RunnerStoppedError(
                    OUTCOMES.get(answer.stage, Outcome.RUN_FAIL), f"{answer.stage}: {answer.error}"
                )
            self.tools[answer.runner] = answer.runtime
            self.transport.pull("run/logits.f32", logits, timeout_s=limit_s)
            try:
                return answer, np.array(read_logits(logits, answer))
            except ValueError as error:
                raise RunnerStoppedError(Outcome.RUN_FAIL, str(error)) from None

    def _install(self, folder: Path, described: Manifest, limit_s: float) -> tuple[tuple[str, ...], str]:
        """Bring runner and artifact to the device, once per artifact."""
        if str(folder) not in self.installed:
            target = described.plan.target
            runner = cast(RunnerModule, importlib.import_module(f"runtime_tests.runner.{target.session}"))
            start = runner.install(self.transport, self.device, timeout_s=limit_s)
            place = f"artifacts/{described.id}"
            self.transport.push(folder, place, timeout_s=limit_s)
            self.installed[str(folder)] = start, f"{place}/{target.artifact}"
        return self.installed[str(folder)]

    def _facts(self) -> str:
        """The device's own words."""
        ended = self.transport.run(["sh", "-c", device_facts.SCRIPT], timeout_s=ASK_S)
        return ended.stdout.decode(errors="replace")
