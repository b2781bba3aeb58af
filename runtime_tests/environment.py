"""The machine and the software a measurement belongs to. Knows nothing about what is measured."""

import os
import platform
from pathlib import Path

import psutil

from export.manifest import tool_versions

from .record import Environment


def current() -> Environment:
    """Describe the machine this runs on, now."""
    return Environment(
        os=platform.platform(terse=True) if platform.system() != "Darwin" else f"macOS {platform.mac_ver()[0]}",
        cpu=cpu_name(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        load_average_1min=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        tools=tool_versions(),
    )


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
