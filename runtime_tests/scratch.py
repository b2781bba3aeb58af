"""A folder for one run's logits, gone when the run ends; what a killed run left is removed by the next."""

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export import disk

PREFIX = ".runtime-tests-"
LOCK = ".run.lock"
YOUNG_S = 60.0
"""A folder may have no lock yet."""


@contextmanager
def folder(build: Path) -> Iterator[Path]:
    """A fresh folder inside `build`."""
    sweep(build)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=build) as made, disk.locked(Path(made) / "run"):
        yield Path(made).resolve()


def sweep(build: Path) -> None:
    """Remove folders whose run is no more: the kernel gave back their locks."""
    for left in build.glob(f"{PREFIX}*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > YOUNG_S and not is_held(left / LOCK):
            shutil.rmtree(left, ignore_errors=True)


def is_held(lock: Path) -> bool:
    """Whether a running process has it."""
    try:
        with lock.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
