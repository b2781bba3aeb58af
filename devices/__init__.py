"""Where and how to run a command: one YAML per device. No module here imports anything of models or formats."""

from pathlib import Path
from typing import Literal

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
    "ComputeUnits",
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
    "visible",
]

FOLDER = CHECKOUT / "devices"
ComputeUnits = Literal["cpu", "cpu_gpu", "cpu_ne", "all"]
"""Processors of a Mac or phone: the CPU alone, with its GPU, with its Neural Engine, or all of them."""


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
    """Threads of a session; null: one for each physical core that is not made to save energy."""
    compute_units: ComputeUnits = "cpu_gpu"
    """What Core ML may run on there; nothing else reads it."""
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
