"""A folder for one run's logits, removed at the end of the run; the next run removes what a killed run left."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.host import disk

PREFIX = ".runtime-tests-"
_LOCK = ".run.lock"
_YOUNG_S = 60.0
"""Seconds in which a new folder may have no lock yet."""


@contextmanager
def folder(build: Path) -> Iterator[Path]:
    """A fresh folder inside `build`."""
    sweep(build)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=build) as made, disk.turn(Path(made) / "run"):
        yield Path(made).resolve()


def sweep(build: Path) -> None:
    """Remove the folders of runs that ended: the kernel has released their locks. Without locks nothing is removed."""
    for path in build.glob(f"{PREFIX}*"):
        if path.is_dir() and time.time() - path.stat().st_mtime > _YOUNG_S and not disk.is_locked(path / _LOCK):
            shutil.rmtree(path, ignore_errors=True)
