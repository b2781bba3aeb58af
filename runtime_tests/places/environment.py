"""The machine and the software that a measurement belongs to, where it is this machine."""

import platform
import subprocess

from devices import Device
from export.formats import tool_versions
from export.host import memory, processor
from runtime_tests import coreml
from runtime_tests.evidence.record import DeviceState, Environment

from . import facts


def current(compute_units: str | None = None) -> Environment:
    """The machine that runs this program as far as it may use it, with its load at this moment.

    `compute_units`: on which Core ML runs, which is told where it is there.
    """
    core_ml = {"Core ML": compute_units} if compute_units and coreml.in_core_ml() else {}
    told = facts.environment(_told(), tool_versions() | core_ml, platform.python_version())
    shared = {"cores": min(told.cores, processor.usable()), "memory_bytes": memory.total_bytes()}
    return told.model_copy(update=shared)


def state() -> DeviceState:
    """Temperatures, battery, clocks and load at this moment."""
    return facts.state(_told())


def threads(device: Device | None = None) -> int:
    """Of a session here: those of the device's YAML, else one for each fast physical core that this process may use."""
    return (device and device.threads) or min(facts.threads(_told()), processor.usable())


def _told() -> str:
    ended = subprocess.run(["sh", "-c", facts.SCRIPT], capture_output=True, check=True)
    return ended.stdout.decode(errors="replace")
