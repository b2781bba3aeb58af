"""Memory that this process holds, by the system's own account. Copied to devices: needs only Python 3.9.

On Linux what is resident. macOS counts a footprint: buffers of Metal and compressed pages are in it, and in what is
resident there they are not. Elsewhere nothing is known, which is 0.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

_RUSAGE_INFO_V4 = 4
_FIELDS = struct.Struct("16x35Q")
"""`struct rusage_info_v4` of <sys/resource.h> (macOS 10.13): a UUID, then 64-bit numbers."""
_NOW, _MOST = 7, 28
"""Places of ri_phys_footprint and ri_lifetime_max_phys_footprint among them."""


def held_bytes() -> int:
    """Now."""
    return footprint(_usage())[0] if sys.platform == "darwin" else in_status(_status(), "VmRSS:")


def peak_bytes() -> int:
    """At most since the process began."""
    return footprint(_usage())[1] if sys.platform == "darwin" else in_status(_status(), "VmHWM:")


def in_status(text: str, field: str) -> int:
    """A field of /proc/self/status, which counts in KiB."""
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field)), 0)


def footprint(usage: bytes) -> tuple[int, int]:
    """Now and at most, from `struct rusage_info_v4`."""
    numbers = _FIELDS.unpack(usage)
    return numbers[_NOW], numbers[_MOST]


def _status() -> str:
    try:
        return Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _usage() -> bytes:
    usage = ctypes.create_string_buffer(_FIELDS.size)  # zeros where the call fails
    ctypes.CDLL(None).proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, usage)
    return usage.raw
