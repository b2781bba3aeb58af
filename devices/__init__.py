"""Where artifacts run: one YAML per device. Knows nothing about models, formats or measurements."""

import os
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from .address import Address
from .opening import open_transport
from .transport import (
    Completed,
    DeadlineError,
    DeviceBusyError,
    DeviceError,
    DeviceLostError,
    NoSpaceError,
    TransferError,
    Transport,
)

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
    "load",
    "names",
    "open_transport",
    "physical_cores",
    "physical_threads",
    "thread_count",
]

FOLDER = Path(__file__).parent


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
    """Longest wait; timings of a device that is still hot then decide nothing."""


class Device(BaseModel):
    """One device, as its YAML states it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    emulated: bool
    """Whether the lab stands in for it: what it computes counts, how long it takes does not."""
    transport: Address
    """How commands reach it."""
    workdir: str
    """Where files and commands go; a relative one starts at the home folder (ssh) or the current one (local)."""
    abi: str | None
    """What programs it runs, as it says itself (`uname -m`; on Android `ro.product.cpu.abi`); null: any."""
    soc: str | None
    cores: PositiveInt | None
    memory_gb: PositiveFloat | None
    peak_bandwidth_gb_s: PositiveFloat | None
    """Of its memory, as its maker states it; null: not known."""
    runner: Path | None
    """Another runner of the user's own, built for the device; null: ours."""
    targets: tuple[str, ...]
    """Names of the targets whose artifacts it can run."""
    threads: PositiveInt | None
    """Threads of a session; null: one per physical core."""
    evaluation: str
    """What is measured on it, where the command does not say."""
    time_limit_s: PositiveFloat
    """Longest one step may take before it is ended."""
    budgets: Budgets
    cool_down: CoolDown | None
    """null: it is timed as it is."""
    max_cv: PositiveFloat
    """Standard deviation over mean of repeated timings above which a timing decides nothing."""


def names() -> list[str]:
    """Every known device."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Device:
    """The device of that name."""
    if name not in names():
        raise DeviceError(f"unknown device {name!r}; known: {', '.join(names())}")
    path = FOLDER / f"{name}.yaml"
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Device.model_validate({"name": name, **fields})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise DeviceError(f"{path}: {' '.join(problems.split())}") from None
    except (OSError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DeviceError(f"{path}: not readable as `key: value` lines: {' '.join(str(error).split())}") from None


def thread_count(device: Device) -> int:
    """Threads a session on the local device gets: as its YAML says, else one per physical core."""
    return device.threads or physical_threads()


def physical_threads() -> int:
    """One thread per physical core of this machine."""
    return physical_cores() or os.cpu_count() or 1


def physical_cores() -> int:
    """Distinct (package, core) pairs the system shows this process; 0 where it does not tell."""
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
