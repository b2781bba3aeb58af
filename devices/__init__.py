"""Where and how to run a command: one YAML per device. No module here imports anything of models or formats."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from export.errors import CHECKOUT, ExportError, found, load_record, stems, suggestion

from .transports import (
    Completed,
    DeadlineError,
    DeviceBusyError,
    DeviceError,
    DeviceLostError,
    NoSpaceError,
    TransferError,
    Transport,
    last_line,
    visible,
)
from .transports.connection import AnyAddress, open_transport

__all__ = [
    "Budgets",
    "Completed",
    "CoolDown",
    "DeadlineError",
    "Device",
    "DeviceBusyError",
    "DeviceError",
    "DeviceLostError",
    "NoSpaceError",
    "TransferError",
    "Transport",
    "file_of",
    "last_line",
    "load",
    "names",
    "open_transport",
    "physical_threads",
    "thread_count",
    "visible",
]

FOLDER = CHECKOUT / "devices"


class Budgets(BaseModel):
    """What an artifact must reach on this device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_decode_tps: PositiveFloat
    """Tokens per second while generating."""
    max_ttft_s: PositiveFloat
    """Seconds from prompt to first token."""


class CoolDown(BaseModel):
    """When a device is cool enough to be timed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_c: PositiveFloat
    """The hottest thermal zone, °C."""
    limit_s: PositiveFloat
    """Longest wait, after which timings of a device that is still hot decide nothing."""


class Device(BaseModel):
    """One device, as its YAML states it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    """For people; decides nothing."""
    emulated: bool
    """Whether it is one of the lab's: its results count, its times do not."""
    transport: AnyAddress
    """How commands reach it."""
    workdir: str
    """Where files and commands go; a relative one starts at the home folder (ssh) or the current one (local)."""
    abi: str | None
    """What programs it runs, as it reports itself (`uname -m`; on Android `ro.product.cpu.abi`); null: any."""
    runner: Path | None = None
    """A runner of the user's own (docs/runner.md), built for the device; left out: ours."""
    targets: tuple[str, ...]
    """Names of the targets whose artifacts it can run."""
    threads: PositiveInt | None
    """Threads of a session; null: one per physical core."""
    evaluation: str
    """Name of the evaluation where the command names none."""
    time_limit_s: PositiveFloat
    """Longest time of one step; then it is ended."""
    budgets: Budgets
    """Of speed; an artifact that misses them is too slow."""
    cool_down: CoolDown | None
    """null: timed without waiting."""
    max_cv: PositiveFloat
    """Standard deviation over mean of repeated timings above which a timing decides nothing."""

    @property
    def attached(self) -> bool:
        """Whether it is another machine than the one that runs the command."""
        return self.transport.kind != "local"


def names() -> list[str]:
    """Every known device, the user's own in `devices` of the current folder among them."""
    return stems(FOLDER)


def file_of(name: str) -> Path:
    """The YAML of a name, the user's own before ours. Relative paths in it begin where its folder `devices` lies."""
    return found(FOLDER, f"{name}.yaml")


def load(name: str) -> Device:
    """Read the YAML of that name. Raises DeviceError in one line."""
    if name not in names():
        raise DeviceError(f"unknown device {name!r}; {suggestion(name, names())}")
    try:
        return load_record(Device, file_of(name))
    except ExportError as error:
        raise DeviceError(str(error)) from None


def thread_count(device: Device) -> int:
    """Threads of a session on the local device: those of its YAML, else one per physical core."""
    return device.threads or physical_threads()


def physical_threads() -> int:
    """One thread per physical core of this machine."""
    return _physical_cores() or os.cpu_count() or 1


def _physical_cores() -> int:
    """Distinct (package, core) pairs that the system shows to this process; 0 where it shows none."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS
        return 0
    cores = set()
    for cpu in allowed:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(tuple((folder / name).read_text() for name in ("physical_package_id", "core_id")))
        except OSError:
            return 0
    return len(cores)
