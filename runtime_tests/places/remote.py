"""An attached device as a place: the runner and the artifact are pushed, scripts run there, answers come back.

The runner of a format is brought by the module of its session's name in `runtime_tests.device_runner`.
"""

import importlib
import logging
import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from devices import Device, DeviceError, NoSpaceError, Transport, last_line
from export import formats, manifest
from export.errors import ExportError
from export.formats import storage
from export.host.console import stage
from export.manifest import Manifest
from runtime_tests import sessions
from runtime_tests.device_runner import (
    Answer,
    Command,
    Logits,
    RunnerFailure,
    fitting,
    parse_answer,
    read_logits,
    write_script,
)
from runtime_tests.evidence.record import DeviceState, Environment, Outcome
from runtime_tests.jobs import ConformanceJob, GenerateJob, LogitsJob, SpeedJob, Task, logits_file, scripts
from runtime_tests.jobs.child import Child
from runtime_tests.jobs.isolation import Ended, Progress
from runtime_tests.jobs.scripts import RunnerStoppedError

from . import ArtifactJob, facts, outcome_of

LOG = logging.getLogger(__name__)
_ASK_S = 60.0
_RUN, _ARTIFACTS, _RUNNERS = "run", "artifacts", "runners"
"""Folders on the device: of one run, and those that stay for the next one."""
_SCRIPT, LOGITS = f"{_RUN}/script.txt", f"{_RUN}/logits.f32"
_Pushed = TypeVar("_Pushed")
_NO_LOGITS = np.empty((0, 0), np.float32)
_OUTCOMES = {"load": Outcome.LOAD_FAIL, "crash": Outcome.CRASH}


class _RunnerModule(Protocol):
    """A module of `runtime_tests.device_runner` that brings one session's runner to devices."""

    def require(self, device: Device, abi: str, transport: Transport | None, /) -> None:
        """Raise at once what `install` would find missing here or there; None: it does not run yet."""

    def install(self, transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
        """Push the runner; the command that starts it in the working folder. Raises DeviceError, ExportError."""


def runner_module(session: str) -> _RunnerModule:
    """What brings the session's runner to a device. Raises ExportError: no such session."""
    return cast(_RunnerModule, importlib.import_module(f"runtime_tests.device_runner.{sessions.require(session)}"))


class AttachedDevice:
    """One device, locked during a run."""

    attached = True
    settings: tuple[str, ...] = ()

    def __init__(self, device: Device, transport: Transport, scratch: Path) -> None:
        self.device = device
        self.transport = transport
        self.scratch = scratch
        self.tools: dict[str, str] = {}
        self.runners: dict[str, tuple[str, ...]] = {}
        """By session: the command that starts its runner."""
        self.models: dict[Path, str] = {}
        """By artifact folder: the model's path on the device."""
        self.abi = transport.abi()
        self.facts = self._ask_facts()
        self.threads = device.threads or facts.threads(self.facts)

    def prepare(self, manifests: Sequence[Manifest]) -> None:
        """Push the runners before any work: a missing one ends the run with one line and is no artifact's failure."""
        for described in manifests:
            self._require_memory(described)
        for described in manifests:
            with stage("runner", described.plan.target.name):
                self._with_room(described, partial(self._runner, described.plan.target.session))

    def _require_memory(self, described: Manifest) -> None:
        """Raises DeviceError: the device has less memory than the process takes when its context is full."""
        needed, there = formats.load(described.plan.target.backend).process_bytes(described), self.environment()
        if needed and 0 < there.memory_bytes < needed:
            raise DeviceError(
                f"{self.device.name}: {described.id} takes {storage.process(described)} with a full context, the "
                f"device has {there.memory_bytes / 1e6:,.0f} MB; build it with a shorter context (--context), fewer "
                "bytes a token (--cache) or from a smaller model"
            )

    def environment(self) -> Environment:
        """As last reported: the record of a lost device still names the device."""
        return facts.environment(self.facts, self.tools)

    def state(self) -> DeviceState:
        self.facts = self._ask_facts()
        return facts.state(self.facts)

    def tidy(self) -> None:
        """Remove the files of this run. Runners and artifacts stay for the next run as long as there is room."""
        try:
            self.transport.run(["rm", "-rf", _RUN], timeout_s=_ASK_S)
        except DeviceError as error:  # no reason to lose the run's results
            LOG.warning("%s; what this run wrote stays there until the next one", error)

    def run(
        self, job: ArtifactJob, *, limit_s: float, on_progress: Progress | None = None, child: Child | None = None
    ) -> Ended:
        del child  # of this machine
        try:
            return Ended(Outcome.PASS, "", self._run(job, limit_s, on_progress))
        except RunnerStoppedError as stop:
            return Ended(stop.outcome, str(stop))
        except DeviceError as error:
            return Ended(outcome_of(error), str(error))
        except ExportError as error:
            return Ended(Outcome.RUN_FAIL, str(error))

    def _run(self, job: ArtifactJob, limit_s: float, on_progress: Progress | None) -> dict[str, Any]:
        folder = Path(job.folder)
        described = manifest.read(folder)
        context_length = described.contract.kv.context_length

        def execute(commands: Sequence[Command]) -> tuple[Answer, NDArray[np.float32]]:
            return self._execute(folder, described, commands, limit_s)

        match job:
            case LogitsJob():
                _write_logits(job.tasks, described.architecture.vocab_size, execute, on_progress)
                return {"tasks": len(job.tasks), "measures_speed": True}
            case GenerateJob():
                return scripts.generate(job, execute)
            case ConformanceJob():
                return scripts.conformance(job, context_length, execute, endless=described.contract.kv.sink is not None)
            case SpeedJob():
                return scripts.speed(job, context_length, execute)

    def _execute(
        self, folder: Path, described: Manifest, commands: Sequence[Command], limit_s: float
    ) -> tuple[Answer, NDArray[np.float32]]:
        """Run a script in the artifact's runner; returns its answer and the logits [R, V] that the script asks for."""
        model = self._with_room(described, lambda: self._model(folder, described))
        start = self._runner(described.plan.target.session)
        with_logits = any(isinstance(command, Logits) for command in commands)
        argv = [*start, model, _SCRIPT, "--threads", str(self.threads), *(("--logits", LOGITS) if with_logits else ())]
        with tempfile.TemporaryDirectory(dir=self.scratch) as local:
            script = Path(local) / "script"
            write_script(commands, script)
            self.transport.push(script, _SCRIPT, timeout_s=_ASK_S)
            ended = self.transport.run(argv, timeout_s=limit_s)
            answer = parse_answer(ended.stdout, ended.returncode, ended.stderr)
            if isinstance(answer, RunnerFailure):
                raise RunnerStoppedError(
                    _OUTCOMES.get(answer.stage, Outcome.RUN_FAIL), f"{answer.stage}: {answer.error}"
                )
            try:
                fitting(answer, commands, described.architecture.vocab_size)
            except ValueError as error:
                raise RunnerStoppedError(Outcome.RUN_FAIL, f"protocol: {error}") from None
            self.tools[last_line(answer.runner)] = last_line(answer.runtime)
            logits = self._pull_logits(answer, Path(local) / "logits", limit_s) if with_logits else _NO_LOGITS
            return answer, logits

    def _pull_logits(self, answer: Answer, local: Path, limit_s: float) -> NDArray[np.float32]:
        self.transport.pull(LOGITS, local, timeout_s=limit_s, most_bytes=answer.logits_rows * answer.vocab_size * 4)
        try:
            return np.array(read_logits(local, answer))
        except ValueError as error:
            raise RunnerStoppedError(Outcome.RUN_FAIL, f"logits: {error}") from None

    def _with_room(self, described: Manifest, push: Callable[[], _Pushed]) -> _Pushed:
        """Push something; where there is too little room, files that other artifacts need are removed first."""
        try:
            return push()
        except NoSpaceError as error:
            LOG.warning("%s: other artifacts and runners there are removed", error)
            self._make_room(described.id)
            return push()

    def _runner(self, session: str) -> tuple[str, ...]:
        """The command that starts a session's runner, which is pushed once."""
        if session not in self.runners:
            limit_s = self.device.time_limit_s
            self.runners[session] = runner_module(session).install(self.transport, self.device, timeout_s=limit_s)
        return self.runners[session]

    def _model(self, folder: Path, described: Manifest) -> str:
        """The model's path on the device; each artifact is pushed once."""
        self._runner(described.plan.target.session)
        if folder not in self.models:
            remote = f"{_ARTIFACTS}/{described.id}"
            listed = {manifest.FILE, *described.files}  # and nothing that lies beside them: no link is followed
            self.transport.push(folder, remote, timeout_s=self.device.time_limit_s, only=listed)
            self.models[folder] = f"{remote}/{described.plan.target.artifact}"
        return self.models[folder]

    def _make_room(self, artifact: str) -> None:
        """Remove everything that this artifact does not need, or that is pushed again quickly."""
        mine = shlex.quote(artifact)
        script = f'for i in {_ARTIFACTS}/*; do case "${{i##*/}}" in {mine}|{mine}.part) ;; *) rm -rf "$i" ;; esac; done'
        self.transport.run(["sh", "-c", f"{script}; rm -rf {_RUN} {_RUNNERS}"], timeout_s=_ASK_S)
        self.runners, self.models = {}, {}

    def _ask_facts(self) -> str:
        ended = self.transport.run(["sh", "-c", facts.SCRIPT], timeout_s=_ASK_S)
        return ended.stdout.decode(errors="replace")


def _write_logits(tasks: Sequence[Task], vocab: int, execute: scripts.Execute, on_progress: Progress | None) -> None:
    """Write the logits of each task's windows, float32 [W, decode + 1, V]."""
    loaded = [(np.load(task.tokens), task.prefill) for task in tasks]
    done, total = 0, sum(len(windows) for windows, _ in loaded)
    with ExitStack() as files:
        writes = [
            files.enter_context(logits_file.writing(task.out, (len(windows), windows.shape[1] - prefill, vocab)))
            for task, (windows, prefill) in zip(tasks, loaded, strict=True)
        ]
        for parts, script in scripts.window_scripts(loaded, vocab):
            logits = execute(script)[1]
            ends = np.cumsum([rows for _, rows in parts])
            for (task, _), own in zip(parts, np.split(logits, ends[:-1]), strict=True):
                writes[task](own)
            done += len(parts)
            if on_progress:
                on_progress(done, total)
