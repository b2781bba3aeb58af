"""Namespaces and mounts through the C library. Knows nothing of devices or daemons."""

import ctypes
import fcntl
import os
import signal
import socket
import struct
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
ALL_BUT_USER = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG = 1
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
# flags of statvfs(3) → of mount(2): a bind mount in a user namespace must keep those it was made with
KEPT_FLAGS = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}


def check(result: int, what: str) -> None:
    """Raise the C library's error."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the parent's namespaces."""
    check(libc.unshare(flags), "unshare")


def mount(source: str, target: Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Attach a file system, or change one that is attached."""
    check(libc.mount(source.encode(), str(target).encode(), kind.encode(), flags, options.encode()), f"mount {target}")


def bind(source: Path, target: Path) -> None:
    """The same files at a second place, with everything mounted below."""
    mount(str(source), target, flags=MS_BIND | MS_REC)


def protect(folder: Path) -> None:
    """Make what is bound at `folder` read-only here."""
    had = os.statvfs(folder).f_flag
    kept = sum(flag for bit, flag in KEPT_FLAGS.items() if had & bit)
    mount("", folder, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def die_with_parent() -> None:
    """Be killed when the process that started this one ends, however it ends."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")


def switch_loopback(*, up: bool) -> None:
    """Plug this network namespace's only interface in or out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", 0)
        name, flags = struct.unpack("16sh22x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))
        flags = flags | IFF_UP if up else flags & ~IFF_UP
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", name, flags))
