"""One artifact in the setting of its run, and the findings of its checks."""

import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from devices import Device
from export import formats
from export.host.console import counted
from export.manifest import Manifest
from export.plan import CacheLimits, TargetLimits
from runtime_tests import jobs
from runtime_tests.evaluation import Evaluation, Windows
from runtime_tests.evidence.record import Comparison, DeviceState, Environment, Gate, Latency, Outcome
from runtime_tests.jobs import isolation
from runtime_tests.jobs.child import Child
from runtime_tests.jobs.isolation import Ended
from runtime_tests.places import ArtifactJob, Place

from .limits import FEW_POSITIONS, Limits

_Result = TypeVar("_Result")


class Turns:
    """Of artifacts side by side: their child processes work at once, this process for one artifact at a time.

    Neither transformers' imports nor our workers for templates are made for threads.
    """

    def __init__(self, jobs_at_once: int = 1) -> None:
        self._turn = threading.Condition()
        self._jobs = threading.Semaphore(jobs_at_once)
        self._shared = False

    @contextmanager
    def mine(self) -> Iterator[None]:
        """The turn of the artifact that this thread examines."""
        with self._turn:
            yield

    @contextmanager
    def given_away(self) -> Iterator[None]:
        """Within a turn: until the end of the block others have theirs."""
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within a turn: until the end of the block others have theirs, and no more jobs than cores run."""
        with self.given_away(), self._jobs:
            yield

    @contextmanager
    def for_all(self) -> Iterator[None]:
        """Within a turn: work whose results several artifacts need, so that the next finds them, children included."""
        self._turn.wait_for(lambda: not self._shared)
        self._shared = True
        try:
            yield
        finally:
            self._shared = False
            self._turn.notify_all()


class Shared:
    """What several artifacts of a run share, each computed once, by whichever asks first; the others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Hashable, Future[Any]] = {}

    def once(self, key: Hashable, compute: Callable[[], _Result]) -> _Result:
        """The result of `compute`, or of the call before with an equal key; raises what that raised."""
        with self._lock:
            first = key not in self._known
            future: Future[_Result] = self._known.setdefault(key, Future())
        if first:
            try:
                future.set_result(compute())
            except BaseException as error:
                future.set_exception(error)
        return future.result()


@dataclass(frozen=True)
class Setting:
    """What the validations of one run share."""

    run_id: str
    device: Device
    place: Place
    """Where artifacts run; references are always computed on this machine."""
    threads: int
    """For the references."""
    evaluation: Evaluation
    source: str | None
    """The origin of checkpoints, when it is not the manifests'."""
    limits: Limits | None
    """What judges the artifacts; None: the limits of this checkout."""
    cache: Path
    scratch: Path
    read_bandwidth_bytes_per_s: float | None
    """Of the device; None: not measured."""
    turns: Turns = field(default_factory=Turns)
    shared: Shared = field(default_factory=Shared)


@dataclass(frozen=True)
class Subject:
    """One artifact under examination."""

    folder: Path
    manifest: Manifest
    setting: Setting
    judged_by: Limits
    child: Child = field(default_factory=Child)
    """Runs the jobs that are not timed."""

    @property
    def limits(self) -> TargetLimits:
        """What the lowering, cache included, may lose on the device's processor."""
        return self.judged_by.on(self.setting.place.abi, self.cache_limits)

    @property
    def cache_limits(self) -> CacheLimits | None:
        """What its kind of cache may lose; None: it is compared with nothing, being the format's usual one."""
        return self.judged_by.cache.get(formats.cache_of(self.manifest.plan))

    @property
    def far_limits(self) -> TargetLimits | None:
        """What it may lose at several places of its context; None: it is compared there with nothing."""
        if self.cache_limits or not self.manifest.plan.policy:
            return self.limits if self.cache_limits else None
        return self.judged_by.on(self.setting.place.abi, FEW_POSITIONS)

    @property
    def folder_text(self) -> str:
        """The absolute path, for a child process."""
        return str(self.folder.resolve())

    @property
    def cache_text(self) -> str:
        """The absolute path of the cache folder."""
        return str(self.setting.cache.resolve())

    def run_here(self, job: jobs.Job, label: str) -> dict[str, Any]:
        """The result of a job in a child process on this machine. Raises StoppedError."""
        return self._run(isolation.run, job, label)

    def run_on_device(self, job: ArtifactJob, label: str) -> dict[str, Any]:
        """The result of a job at the place where artifacts run. Raises StoppedError."""
        return self._run(self.setting.place.run, job, label)

    def _run(self, run: Callable[..., Ended], job: jobs.Job, label: str) -> dict[str, Any]:
        child = None if isinstance(job, jobs.Timed) else self.child
        with counted(label) as progress, self.setting.turns.at_work():
            ended = run(job, limit_s=self.setting.device.time_limit_s, on_progress=progress, child=child)
        if ended.outcome is not Outcome.PASS:
            raise StoppedError(ended.outcome, f"{label}: {ended.detail}")
        return ended.result


@dataclass(frozen=True)
class Timing:
    """The speed of an artifact on a device, and the device's state before and after."""

    environment: Environment
    before: DeviceState
    after: DeviceState
    latency: Latency | None
    """None: not timed."""


@dataclass(frozen=True)
class Finding:
    """The results of one check, or of several in a row."""

    gates: tuple[Gate, ...] = ()
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """By their names in `record.Accuracy`."""
    probe_sqnr_db: tuple[float, ...] = ()
    timing: Timing | None = None
    windows: Windows | None = None
    """Those that were fed."""
    evaluated: bool = False
    """The artifact ran in a reference evaluator, whose speed is nobody's."""

    def __add__(self, later: "Finding") -> "Finding":
        return Finding(
            gates=self.gates + later.gates,
            comparisons=self.comparisons | later.comparisons,
            probe_sqnr_db=self.probe_sqnr_db + later.probe_sqnr_db,
            timing=later.timing or self.timing,
            windows=later.windows or self.windows,
            evaluated=self.evaluated or later.evaluated,
        )


class StoppedError(Exception):
    """Later checks would mean nothing; `finding` holds the results up to here."""

    def __init__(self, outcome: Outcome, detail: str, finding: Finding = Finding()) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.finding = finding


def require(gate: Gate, detail: str) -> Finding:
    """The finding of a gate that all later checks depend on. Raises StoppedError where it failed."""
    if gate.verdict == "fail":
        raise StoppedError(gate.fails_as, detail, Finding((gate,)))
    return Finding((gate,))
