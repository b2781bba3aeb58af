"""One artifact under examination: the setting of its run, and what was found so far. Knows nothing about formats."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devices import Device
from export.manifest import Manifest
from export.plan import TargetLimits
from export.progress import counted

from . import isolation, jobs
from .evaluation import Evaluation
from .isolation import Ended
from .place import ArtifactJob, Place
from .record import Comparison, DeviceState, Environment, Gate, Latency, Outcome
from .regression import Reached


@dataclass(frozen=True)
class Setting:
    """What all artifacts of a run share."""

    run_id: str
    device: Device
    place: Place
    """Where artifacts run; references are computed here, whatever the device."""
    threads: int
    """Of the references."""
    evaluation: Evaluation
    source: str | None
    """Where checkpoints are, when not where the manifests say."""
    cache: Path
    scratch: Path
    read_bandwidth_bytes_per_s: float | None
    """Of the device, where it was measured."""


@dataclass
class Case:
    """One artifact under examination, and what was found so far."""

    folder: Path
    manifest: Manifest
    setting: Setting
    gates: list[Gate] = field(default_factory=list)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    probe_sqnr_db: list[float] = field(default_factory=list)
    before: Reached | None = None
    """This device's baseline, where it holds this artifact and can be compared."""
    latency: Latency | None = None
    environment: Environment | None = None
    states: list[DeviceState] = field(default_factory=list)
    """Before and after the timings."""

    @property
    def limits(self) -> TargetLimits:
        """What the lowering may lose where it runs."""
        target = self.manifest.plan.target
        return target.limits_on.get(self.setting.place.abi, target.limits)

    @property
    def origin(self) -> str:
        """Where the checkpoint is."""
        return self.setting.source or self.manifest.checkpoint.origin

    @property
    def folder_text(self) -> str:
        """The folder as a child process, which has its own working folder, finds it."""
        return str(self.folder.resolve())

    @property
    def cache_text(self) -> str:
        """The cache folder, likewise."""
        return str(self.setting.cache.resolve())


class StoppedError(Exception):
    """Nothing after this can be trusted."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


def ask(case: Case, job: jobs.Job, label: str) -> dict[str, Any]:
    """Run a job in a child process here; when it dies, so does the validation of this artifact, and no more."""
    with counted(label) as progress:
        return result(isolation.run(job, limit_s=case.setting.device.time_limit_s, on_progress=progress), label)


def ask_artifact(case: Case, job: ArtifactJob, label: str) -> dict[str, Any]:
    """Run a job that needs the artifact where artifacts run."""
    with counted(label) as progress:
        ended = case.setting.place.perform(job, limit_s=case.setting.device.time_limit_s, on_progress=progress)
    return result(ended, label)


def result(ended: Ended, label: str) -> dict[str, Any]:
    """What a job gave."""
    if ended.outcome is not Outcome.PASS:
        raise StoppedError(ended.outcome, f"{label}: {ended.detail}")
    return ended.result
