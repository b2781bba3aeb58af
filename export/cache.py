"""The cache folder's size: what was not used for longest goes first. Knows nothing about what is in it.

Everything there is made again when it is missing; what was used lately may be in use by another process and stays.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .disk import size
from .plan import CONFIGS, PositiveNumber, Strict, load_record
from .progress import console

IN_USE_S = 6 * 3600.0
"""No build or validation goes on for so long without touching what it needs."""


LOCK = ".lock"


class Limit(Strict):
    """`configs/cache.yaml`."""

    name: str
    limit_gb: PositiveNumber
    """GB (10⁹ bytes) of build/cache."""


@dataclass(frozen=True)
class Entry:
    """One file, or one folder as a whole."""

    path: Path
    bytes: int
    used: float
    """Seconds since the epoch."""


def trim(cache: Path) -> None:
    """Remove what was not used for longest until the folder is within its limit."""
    limit = load_record(Limit, CONFIGS / "cache.yaml").limit_gb * 1e9
    found = sorted(entries(cache), key=lambda one: one.used)
    total, removed = sum(one.bytes for one in found), 0
    for one in found:
        if total - removed <= limit or one.used > time.time() - IN_USE_S:
            break
        shutil.rmtree(one.path, ignore_errors=True) if one.path.is_dir() else one.path.unlink(missing_ok=True)
        removed += one.bytes
    if removed:
        console.print(
            f"  {cache}: {size(removed)} not used for longest removed (configs/cache.yaml: {size(int(limit))})"
        )


def entries(cache: Path) -> Iterator[Entry]:
    """What the folder holds; not locks, since one that is removed can be held twice."""
    for path in cache.iterdir() if cache.is_dir() else ():
        if path.suffix == LOCK:
            continue
        with suppress(FileNotFoundError):  # another process put it in its place, or trims too
            files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
            states = [one.stat() for one in files]
            if total := sum(state.st_size for state in states):
                yield Entry(path, total, max(state.st_mtime for state in states))


def used(path: Path) -> None:
    """Remember that a file was needed just now."""
    os.utime(path)
