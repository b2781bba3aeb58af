"""The disk: one writer per place, room before the work, one clear line when it is full. Knows nothing of formats."""

import errno
import fcntl
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError
from .progress import console

FULL = (errno.ENOSPC, errno.EDQUOT)
ALMOST_FULL_BYTES = 2**20


class FullError(ExportError):
    """A disk had no room left in the middle of the work."""


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """An advisory lock on `.NAME.lock` beside `path`; the kernel frees it when the process ends, however it ends."""
    with path.with_name(f".{path.name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            held = f"{path}: process {file.read().strip()} is writing it"
            if not wait:
                raise ExportError(f"{held}; wait for it to end") from None
            console.print(f"  waiting: {held}", soft_wrap=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Whatever a writer raises because the disk of `folder` is full becomes one line that says so.

    Native writers raise all kinds of errors there, so the free space is asked too.
    """
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        if not is_full(error) and free_bytes(folder) >= ALMOST_FULL_BYTES:
            raise
        reason = " ".join(str(error).split())
        raise FullError(f"{folder}: the disk is full ({reason}); free some space and run again") from None


def is_full(error: Exception) -> bool:
    """Whether an error says that a disk has no room left."""
    return isinstance(error, FullError) or (isinstance(error, OSError) and error.errno in FULL)


def require_file(folder: Path, needed_bytes: int) -> None:
    """Refuse work that ends in one file larger than the shell allows."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < needed_bytes:
        raise ExportError(
            f"{folder}: needs a file of {megabytes(needed_bytes)} MB, files are limited to {megabytes(limit)} MB here "
            "(ulimit -f); raise the limit"
        )


def require_room(folder: Path, needed_bytes: int) -> None:
    """Refuse work that cannot end well: the disk of `folder` has less than what will be written."""
    if (free := free_bytes(folder)) < needed_bytes:
        missing = megabytes(needed_bytes - free)
        raise ExportError(
            f"{folder}: needs {megabytes(needed_bytes)} MB on the disk, has {megabytes(free)} MB; free {missing} MB"
        )


def free_bytes(folder: Path) -> int:
    """Free space where the folder is, or will be."""
    return shutil.disk_usage(existing(folder)).free


def device(folder: Path) -> int:
    """Which disk the folder is, or will be, on."""
    return existing(folder).stat().st_dev


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def size(size_bytes: int) -> str:
    """For people: `3.4 GB`, `2.1 MB`; a GB is a thousand million bytes."""
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e8 else f"{megabytes(size_bytes)} MB"


def megabytes(size_bytes: int) -> str:
    """For people: 1 MB is a million bytes."""
    return f"{size_bytes / 1e6:,.1f}"


@contextmanager
def scratch(folder: Path) -> Iterator[None]:
    """Libraries put their temporary files into `folder`, which is removed at the end.

    The system's temporary folder may be small or in memory, and would keep the files of a killed process.
    """
    before = tempfile.tempdir
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)
