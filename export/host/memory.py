"""Memory: what this process may still take, and giving back what is free but still counted as ours."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import cgroups, darwin
from .cgroups import MOUNT, PROC


@dataclass(frozen=True)
class Room:
    """How much memory there is, and what limits it."""

    bytes: int
    limited_by: str
    """For people: `this machine`, `the container's limit (memory.max)`, `ulimit -v`."""


def free() -> Room:
    """What all processes together may still take: free memory of this machine, or of the control group if that is less.

    File pages count as free, because the kernel drops them; swap does not.
    """
    machine = Room(_available(), "this machine")
    return min((machine, *cgroup_rooms()), key=lambda room: room.bytes)


def _available() -> int:
    level = darwin.sysctl("kern.memorystatus_level") if sys.platform == "darwin" else None
    told = psutil.virtual_memory()
    return darwin.available_bytes(told.total, level) or told.available


def total_bytes(proc: Path = PROC, mount: Path = MOUNT) -> int:
    """Memory of this machine, or what a control group leaves of it."""
    limits = (files.limit_bytes(folder) for files, folder in _groups(proc, mount))
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def within_reach() -> Room:
    """What this process may hold in total: what it holds now and what is free, or its own limit if that is less."""
    now, room = psutil.Process().memory_info(), free()
    reach = Room(now.rss + room.bytes, room.limited_by)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return reach
    # the limit is on address space, of which more is mapped than is ever held
    return min(reach, Room(max(0, now.rss + limit - now.vms), "ulimit -v"), key=lambda room: room.bytes)


def cgroup_rooms(proc: Path = PROC, mount: Path = MOUNT) -> Iterator[Room]:
    """Free memory of every control group with a limit that this process is in."""
    for files, folder in _groups(proc, mount):
        if room := files.room(folder):
            yield room


def _groups(proc: Path, mount: Path) -> "Iterator[tuple[_GroupFiles, Path]]":
    for version, folder in cgroups.folders("memory", proc, mount):
        files = _V2 if version == 2 else _V1
        if (folder / files.limit).is_file():
            yield files, folder


@dataclass(frozen=True)
class _GroupFiles:
    """Names of the files in which a version of control groups states its numbers."""

    limit: str
    used: str
    cached: tuple[str, str]
    """Lines of memory.stat: file pages, which the kernel drops before it refuses memory."""

    def limit_bytes(self, folder: Path) -> int | None:
        """Of one group; None: without a limit."""
        limit = (folder / self.limit).read_text(encoding="utf-8").strip()
        return None if limit == "max" else int(limit)

    def room(self, folder: Path) -> Room | None:
        """Free memory of one group; None without a limit."""
        limit = self.limit_bytes(folder)
        if limit is None:
            return None
        stat = (folder / "memory.stat").read_text(encoding="utf-8")
        lines = (line.partition(" ") for line in stat.splitlines())
        cached = sum(int(value) for name, _, value in lines if name in self.cached)
        used = int((folder / self.used).read_text(encoding="utf-8")) - cached
        return Room(max(0, limit - used), f"the control group's {self.limit}")


_V1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _GroupFiles("memory.max", "memory.current", ("inactive_file", "active_file"))


def give_back() -> None:
    """Return freed memory to the system: glibc holds on to what several threads freed, 1 GB after quantizing 1B."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
