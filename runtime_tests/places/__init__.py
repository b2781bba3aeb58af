"""Where jobs that need an artifact run: in child processes of this machine, or on an attached device (`remote`)."""

import platform
from collections.abc import Sequence
from typing import Protocol

from devices import ComputeUnits, DeadlineError, DeviceError, DeviceLostError, NoSpaceError
from export.manifest import Manifest
from runtime_tests import coreml
from runtime_tests.evidence.record import DeviceState, Environment, Outcome
from runtime_tests.jobs import ConformanceJob, GenerateJob, LogitsJob, SpeedJob, isolation
from runtime_tests.jobs.child import Child
from runtime_tests.jobs.isolation import Ended, Progress

from . import environment

ArtifactJob = LogitsJob | ConformanceJob | GenerateJob | SpeedJob
_OUTCOMES: dict[type[DeviceError], Outcome] = {
    DeadlineError: Outcome.TIMEOUT,
    DeviceLostError: Outcome.DEVICE_LOST,
    NoSpaceError: Outcome.DEVICE_FULL,
}


def outcome_of(error: DeviceError) -> Outcome:
    """The outcome of a validation whose device failed."""
    return _OUTCOMES.get(type(error), Outcome.RUN_FAIL)


class Place(Protocol):
    """A device while artifacts are validated on it."""

    threads: int
    """Of a session there."""
    abi: str
    """As the device reports it."""
    attached: bool
    """Whether it is a different machine from this one."""
    settings: tuple[str, ...]
    """Environment variables of child processes here, `NAME=value`."""

    def prepare(self, manifests: Sequence[Manifest]) -> None:
        """Prepare the place for these artifacts. Raises DeviceError, ExportError."""

    def run(
        self, job: ArtifactJob, *, limit_s: float, on_progress: Progress | None = None, child: Child | None = None
    ) -> Ended:
        """Run a job, on this machine in that child process; every failure comes back as an outcome."""

    def environment(self) -> Environment:
        """The machine and software of the measurements, even when the device cannot be reached any more."""

    def state(self) -> DeviceState:
        """Temperatures, battery, clocks and load at this moment. Raises DeviceError."""


class ThisMachine:
    """Every job in a child process: in the one that is given, or of its own."""

    attached = False
    abi = platform.machine()

    def __init__(self, threads: int, compute_units: ComputeUnits = "cpu_gpu") -> None:
        self.threads, self.compute_units = threads, compute_units
        self.settings: tuple[str, ...] = (f"{coreml.UNITS}={compute_units}",)

    def prepare(self, manifests: Sequence[Manifest]) -> None:
        pass

    def run(
        self, job: ArtifactJob, *, limit_s: float, on_progress: Progress | None = None, child: Child | None = None
    ) -> Ended:
        return isolation.run(job, limit_s=limit_s, on_progress=on_progress, settings=self.settings, child=child)

    def environment(self) -> Environment:
        return environment.current(self.compute_units)

    def state(self) -> DeviceState:
        return environment.state()
