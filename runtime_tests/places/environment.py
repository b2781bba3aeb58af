"""The machine and the software that a measurement belongs to."""

import os
import platform
from pathlib import Path

import psutil

from export.formats import tool_versions
from runtime_tests.evidence.record import Environment
from runtime_tests.sessions import mlpackage


def current(compute_units: str | None = None) -> Environment:
    """The machine that runs this program, with its load at this moment; where Core ML is there, on which units it runs.

    Core ML changes with the build of the system.
    """
    core_ml = {"Core ML": compute_units} if compute_units and mlpackage.in_core_ml() else {}
    return Environment(
        os=platform.platform(terse=True)
        if platform.system() != "Darwin"
        else f"macOS {platform.mac_ver()[0]} ({mlpackage.os_build()})",
        cpu=_cpu_name(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        load_average_1min=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        tools=tool_versions() | core_ml,
    )


def _cpu_name() -> str:
    """The processor's marketing name where the system has it, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
