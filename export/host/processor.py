"""How many processors this process may use at a time."""

import os
from collections.abc import Iterator
from pathlib import Path

from . import cgroups
from .cgroups import MOUNT, PROC


def usable() -> int:
    """Processors that work for this process at the same time: those of its affinity, or a control group's share."""
    return min(_allowed(), *shares(), os.cpu_count() or 1)


def _allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shares(proc: Path = PROC, mount: Path = MOUNT) -> Iterator[int]:
    """What `docker --cpus` and the like leave, in whole processors, at least one: more threads are halted in turns."""
    for version, folder in cgroups.folders("cpu", proc, mount):
        files = [folder / "cpu.max"] if version == 2 else [folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"]
        if all(file.is_file() for file in files):
            quota, period = " ".join(file.read_text(encoding="utf-8") for file in files).split()
            if quota not in {"max", "-1"}:
                yield max(1, int(quota) // int(period))


def limit_threads() -> None:
    """From now on OpenMP takes as many threads as a control group leaves, in children too. What a user has set stays.

    To be called before torch is loaded: libgomp sees the affinity, and no share.
    """
    if (count := usable()) < _allowed():
        os.environ.setdefault("OMP_NUM_THREADS", str(count))
