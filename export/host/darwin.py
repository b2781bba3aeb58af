"""What macOS tells of itself, where psutil tells something else. Elsewhere these functions are not called."""

import ctypes


def sysctl(name: str) -> int | None:
    """An integer of sysctl; None: this macOS does not have it."""
    value, size = ctypes.c_uint64(), ctypes.c_size_t(8)  # a shorter one fills the low bytes
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return None if failed else value.value


def available_bytes(total: int, level: int | None) -> int | None:
    """What the system gives up when it is asked for: `memory_pressure` prints the level as a percentage.

    psutil counts free and inactive pages, a third of it: compressed, purgeable and file pages are given up as well.
    """
    return None if level is None else total * level // 100
