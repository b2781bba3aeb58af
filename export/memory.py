"""Memory that is free but still counted as ours."""

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what several threads have freed, 1 GB after quantizing 1B."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
