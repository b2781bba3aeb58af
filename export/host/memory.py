"""Memory: what this process may still take, and giving back what is free but still counted as ours."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_PROC, _CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")


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
    machine = Room(psutil.virtual_memory().available, "this machine")
    return min((machine, *cgroup_rooms(_PROC, _CGROUPS)), key=lambda room: room.bytes)


def peak_rss_bytes() -> int:
    """Most memory this process has held."""
    status = _PROC / "status"
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def within_reach() -> Room:
    """What this process may hold in total: what it holds now and what is free, or its own limit if that is less."""
    now, room = psutil.Process().memory_info(), free()
    reach = Room(now.rss + room.bytes, room.limited_by)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return reach
    # the limit is on address space, of which more is mapped than is ever held
    return min(reach, Room(max(0, now.rss + limit - now.vms), "ulimit -v"), key=lambda room: room.bytes)


def cgroup_rooms(proc: Path, mount: Path) -> Iterator[Room]:
    """Free memory of every control group with a limit that this process is in: versions 1 and 2, parents included.

    A container may see its own group as the root, or the host's path with only its own group mounted.
    """
    if not (proc / "cgroup").is_file():
        return  # not Linux
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            files, tops = _V2, [mount, mount / "unified"]
        elif "memory" in controllers.split(","):
            files, tops = _V1, [mount / "memory"]
        else:
            continue
        for top in tops:
            group = top / inside.strip("/")
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
                if (folder / files.limit).is_file() and (room := files.room(folder)):
                    yield room


@dataclass(frozen=True)
class _GroupFiles:
    """Names of the files in which a version of control groups states its numbers."""

    limit: str
    used: str
    cached: tuple[str, str]
    """Lines of memory.stat: file pages, which the kernel drops before it refuses memory."""

    def room(self, folder: Path) -> Room | None:
        """Free memory of one group; None without a limit."""
        limit = (folder / self.limit).read_text().strip()
        if limit == "max":
            return None
        lines = (line.partition(" ") for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(value) for name, _, value in lines if name in self.cached)
        used = int((folder / self.used).read_text()) - cached
        return Room(max(0, int(limit) - used), f"the control group's {self.limit}")


_V1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _GroupFiles("memory.max", "memory.current", ("inactive_file", "active_file"))


def give_back() -> None:
    """Return freed memory to the system: glibc holds on to what several threads freed, 1 GB after quantizing 1B."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
