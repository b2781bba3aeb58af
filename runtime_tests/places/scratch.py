"""A folder for one run's logits, removed at the end of the run; the next run removes what a killed run left."""

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".runtime-tests-"
_LOCK = ".run.lock"
_YOUNG_S = 60.0
"""Seconds in which a new folder may have no lock yet."""


@contextmanager
def folder(build: Path) -> Iterator[Path]:
    """A fresh folder inside `build`."""
    sweep(build)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=build) as made, (Path(made) / _LOCK).open("w") as lock:
        with suppress(OSError):  # a file system without locks, where no run sweeps
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Path(made).resolve()


def sweep(build: Path) -> None:
    """Remove the folders of runs that ended: the kernel has released their locks. Without locks nothing is removed."""
    for path in build.glob(f"{PREFIX}*"):
        if path.is_dir() and time.time() - path.stat().st_mtime > _YOUNG_S and not _is_held(path / _LOCK):
            shutil.rmtree(path, ignore_errors=True)


def _is_held(lock: Path) -> bool:
    try:
        file = lock.open("a+")
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
