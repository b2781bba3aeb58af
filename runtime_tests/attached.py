"""An attached device as a place: its runner and the artifact are pushed, scripts run there, answers come back.

Knows no format: what a target's artifact needs on a device is in the module of its session's name in `runner`.
"""

import importlib
import logging
import shlex
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from devices import Device, DeviceError, NoSpaceError, Transport
from export import manifest
from export.errors import ExportError
from export.manifest import Manifest
from export.progress import stage

from . import device_facts, logits_file, on_runner
from .isolation import Ended, Progress
from .jobs import ConformanceJob, GenerateJob, LogitsJob, SpeedJob, Task
from .on_runner import RunnerStoppedError
from .place import ArtifactJob, outcome_of
from .record import DeviceState, Environment, Outcome
from .runner import Answer, Command, Logits, RunnerFailure, parse_answer, read_logits, write_script

LOG = logging.getLogger(__name__)
ASK_S = 60.0
RUN, ARTIFACTS, RUNNERS = "run", "artifacts", "runners"
"""Folders on the device: of one run, and what is kept for the next one."""
SCRIPT, LOGITS = f"{RUN}/script.txt", f"{RUN}/logits.f32"
Brought = TypeVar("Brought")
NO_LOGITS = np.empty((0, 0), np.float32)
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
        self.runners: dict[str, tuple[str, ...]] = {}
        """By session: the command that starts its runner."""
        self.models: dict[Path, str] = {}
        """By artifact folder: the model's path there."""
        self.abi = transport.abi()
        self.facts = self._ask_facts()
        self.threads = device.threads or self.environment().cores

    def prepare(self, manifests: Sequence[Manifest]) -> None:
        """Bring the runners before any work is done: one that cannot be had is one line, not an artifact's failure."""
        for described in manifests:
            with stage("runner", described.plan.target.name):
                self._with_room(described, partial(self._runner, described.plan.target.session))

    def environment(self) -> Environment:
        """Of the last time the device was asked: a record of a lost device still says which one it was."""
        return device_facts.environment(self.facts, self.tools)

    def state(self) -> DeviceState:
        self.facts = self._ask_facts()
        return device_facts.state(self.facts)

    def tidy(self) -> None:
        """Remove what only this run needed. Runners and artifacts stay for the next one while there is room."""
        try:
            self.transport.run(["rm", "-rf", RUN], timeout_s=ASK_S)
        except DeviceError as error:  # what was found is told all the same
            LOG.warning("%s; what this run wrote stays there until the next one", error)

    def perform(self, job: ArtifactJob, *, limit_s: float, on_progress: Progress | None = None) -> Ended:
        try:
            return Ended(Outcome.PASS, "", self._perform(job, limit_s, on_progress))
        except RunnerStoppedError as stop:
            return Ended(stop.outcome, str(stop))
        except DeviceError as error:
            return Ended(outcome_of(error), str(error))
        except ExportError as error:
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
        with logits_file.writing(task.out, (len(tokens), rows, vocab)) as write:
            for part, script in on_runner.window_scripts(tokens, task.prefill, vocab):
                write(execute(script)[1])
                if on_progress:
                    on_progress(part.stop, len(tokens))

    def _execute(
        self, folder: Path, described: Manifest, commands: Sequence[Command], limit_s: float
    ) -> tuple[Answer, NDArray[np.float32]]:
        """Run a script in the artifact's runner; its answer and its logits, none where the script asks for none."""
        model = self._with_room(described, lambda: self._model(folder, described))
        start = self._runner(described.plan.target.session)
        wanted = any(isinstance(command, Logits) for command in commands)
        argv = [*start, model, SCRIPT, "--threads", str(self.threads), *(("--logits", LOGITS) if wanted else ())]
        with tempfile.TemporaryDirectory(dir=self.scratch) as local:
            script = Path(local) / "script"
            write_script(commands, script)
            self.transport.push(script, SCRIPT, timeout_s=ASK_S)
            ended = self.transport.run(argv, timeout_s=limit_s)
            answer = parse_answer(ended.stdout, ended.returncode)
            if isinstance(answer, RunnerFailure):
                raise RunnerStoppedError(
                    OUTCOMES.get(answer.stage, Outcome.RUN_FAIL), f"{answer.stage}: {answer.error}"
                )
            self.tools[answer.runner] = answer.runtime
            return answer, self._fetched(answer, Path(local) / "logits", limit_s) if wanted else NO_LOGITS

    def _fetched(self, answer: Answer, local: Path, limit_s: float) -> NDArray[np.float32]:
        """The logits that an answer promises."""
        self.transport.pull(LOGITS, local, timeout_s=limit_s)
        try:
            return np.array(read_logits(local, answer))
        except ValueError as error:
            raise RunnerStoppedError(Outcome.RUN_FAIL, f"logits: {error}") from None

    def _with_room(self, described: Manifest, bring: Callable[[], Brought]) -> Brought:
        """Bring something to the device; what other artifacts need makes room for it."""
        try:
            return bring()
        except NoSpaceError as error:
            LOG.warning("%s: other artifacts and runners there are removed", error)
            self._make_room(described.id)
            return bring()

    def _runner(self, session: str) -> tuple[str, ...]:
        """The command that starts a session's runner, brought to the device once."""
        if session not in self.runners:
            module = cast(RunnerModule, importlib.import_module(f"runtime_tests.runner.{session}"))
            self.runners[session] = module.install(self.transport, self.device, timeout_s=self.device.time_limit_s)
        return self.runners[session]

    def _model(self, folder: Path, described: Manifest) -> str:
        """The model's path on the device, brought there once per artifact."""
        self._runner(described.plan.target.session)
        if folder not in self.models:
            place = f"{ARTIFACTS}/{described.id}"
            self.transport.push(folder, place, timeout_s=self.device.time_limit_s)
            self.models[folder] = f"{place}/{described.plan.target.artifact}"
        return self.models[folder]

    def _make_room(self, artifact: str) -> None:
        """Remove everything that this artifact does not need, or that is brought again quickly."""
        mine = shlex.quote(artifact)
        script = f'for i in {ARTIFACTS}/*; do case "${{i##*/}}" in {mine}|{mine}.part) ;; *) rm -rf "$i" ;; esac; done'
        self.transport.run(["sh", "-c", f"{script}; rm -rf {RUN} {RUNNERS}"], timeout_s=ASK_S)
        self.runners, self.models = {}, {}

    def _ask_facts(self) -> str:
        """The device's own words."""
        ended = self.transport.run(["sh", "-c", device_facts.SCRIPT], timeout_s=ASK_S)
        return ended.stdout.decode(errors="replace")
