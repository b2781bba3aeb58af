"""Which machine and which start of it a process belongs to, in words that stay the same as long as these do."""

import ctypes
import socket
import sys
import uuid
from pathlib import Path

import psutil

_PROC = Path("/proc")
_WAIT_S = 5


def machine(platform: str = sys.platform) -> str:
    """One machine, and one table of process ids: containers may share a name, and each has its own.

    A Mac's name changes with the network that it is in; its UUID does not.
    """
    if platform == "darwin":
        found, wait = ctypes.create_string_buffer(16), (ctypes.c_long * 2)(_WAIT_S, 0)
        if not ctypes.CDLL(None).gethostuuid(found, wait):
            return str(uuid.UUID(bytes=found.raw))
    try:
        space = (_PROC / "self/ns/pid").readlink()
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()} {space}"


def boot(platform: str = sys.platform) -> str:
    """One start of the machine: by the second it began where the system has no identifier, which a new clock moves."""
    if platform == "darwin":
        found, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
        if not ctypes.CDLL(None).sysctlbyname(b"kern.bootsessionuuid", found, ctypes.byref(size), None, 0):
            return found.value.decode()
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return str(int(psutil.boot_time()))
