"""Namespaces and mounts through the C library."""

import ctypes
import fcntl
import os
import signal
import socket
import struct
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
ALL_BUT_USER = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
# flags of statvfs(3) → of mount(2): a bind mount in a user namespace must keep those it was made with
_INHERITED_FLAGS = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}


def _check(result: int, call: str) -> None:
    """Raise the C library's error."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the parent's namespaces."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Attach a file system, or change one that is attached."""
    _check(
        _libc.mount(source.encode(), str(target).encode(), kind.encode(), flags, options.encode()), f"mount {target}"
    )


def bind(source: Path, target: Path) -> None:
    """Show the same files at a second place, with everything mounted below."""
    mount(str(source), target, flags=_MS_BIND | MS_REC)


def protect(folder: Path) -> None:
    """Make a bind mount read-only in this namespace."""
    before = os.statvfs(folder).f_flag
    inherited = sum(flag for bit, flag in _INHERITED_FLAGS.items() if before & bit)
    mount("", folder, flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY | inherited)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")


def switch_loopback(*, up: bool) -> None:
    """Bring this network namespace's only interface up or down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", 0)
        name, flags = struct.unpack("16sh22x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))
        flags = flags | _IFF_UP if up else flags & ~_IFF_UP
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", name, flags))
