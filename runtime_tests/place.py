"""Where the jobs that need an artifact run: here, or on an attached device. Knows no format."""

import platform
import subprocess
from collections.abc import Sequence
from typing import Protocol

import psutil

from devices import DeadlineError, DeviceError, DeviceLostError, NoSpaceError
from export.manifest import Manifest

from . import device_facts, environment, isolation
from .isolation import Ended, Progress
from .jobs import ConformanceJob, GenerateJob, LogitsJob, SpeedJob
from .record import DeviceState, Environment, Outcome

ArtifactJob = LogitsJob | ConformanceJob | GenerateJob | SpeedJob
OUTCOMES: dict[type[DeviceError], Outcome] = {
    DeadlineError: Outcome.TIMEOUT,
    DeviceLostError: Outcome.DEVICE_LOST,
    NoSpaceError: Outcome.DEVICE_FULL,
}


def outcome_of(error: DeviceError) -> Outcome:
    """How an artifact's validation ends when its device fails."""
    return OUTCOMES.get(type(error), Outcome.RUN_FAIL)


class Place(Protocol):
    """One device while artifacts are validated on it."""

    threads: int
    """That a session gets there."""
    abi: str
    """What it runs, as it says itself."""
    attached: bool
    """Whether it is another machine than this one."""

    def prepare(self, manifests: Sequence[Manifest]) -> None:
        """Make ready for these artifacts. Raises DeviceError, ExportError."""

    def perform(self, job: ArtifactJob, *, limit_s: float, on_progress: Progress | None = None) -> Ended:
        """Do a job; whatever happens there comes back as an outcome."""

    def environment(self) -> Environment:
        """The machine and the software the numbers belong to, even when it cannot be reached now."""

    def state(self) -> DeviceState:
        """What it says of itself now. Raises DeviceError."""


class ThisMachine:
    """Every job in a child process of its own."""

    attached = False
    abi = platform.machine()

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def prepare(self, manifests: Sequence[Manifest]) -> None:
        pass

    def perform(self, job: ArtifactJob, *, limit_s: float, on_progress: Progress | None = None) -> Ended:
        return isolation.run(job, limit_s=limit_s, on_progress=on_progress)

    def environment(self) -> Environment:
        return environment.current()

    def state(self) -> DeviceState:
        if not psutil.LINUX:
            return device_facts.state("")
        ended = subprocess.run(["sh", "-c", device_facts.SCRIPT], capture_output=True, text=True, check=True)
        return device_facts.state(ended.stdout)
