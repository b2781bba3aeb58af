"""The disk: one writer per path, room before the work, one clear line when it is full, a cache within its limit."""

import errno
import fcntl
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from export.architecture import PositiveNumber, Strict
from export.errors import ExportError, load_record
from export.plan import CONFIGS

from .console import console, waiting

FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Of flock on file systems without locks: NFS without lockd, Lustre with `noflock`, SMB, some of FUSE.

The last two are one number on Linux and two on macOS.
"""
_ALMOST_FULL_BYTES = 2**20
_PURGEABLE = " (what Finder shows as free may be held by local snapshots: `tmutil deletelocalsnapshots /`)"
_IN_USE_S = 6 * 3600.0
"""Longer than any build or validation goes on without touching what it needs from the cache."""


class FullError(ExportError):
    """A disk had no room left in the middle of the work."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The only writer of `path`: a lock on `.NAME.lock` beside it; the kernel frees it when the process ends.

    The file is removed in the end; one that a killed process left serves the next writer.
    Raises ExportError: another process has it, or the file system has no locks.
    """
    with _locked_file(path) as file:
        _sign(file)
        try:
            yield
        finally:
            if _is_named(path, file):
                _lock_of(path).unlink()


def _locked_file(path: Path) -> IO[str]:
    while True:
        file = _lock_file(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if isinstance(error, BlockingIOError):
                    raise ExportError(f"{_busy(path, file)}; wait for it to end") from None
                raise ExportError(
                    f"{_lock_of(path)}: cannot be locked ({error.strerror}), and two writers would damage {path}; "
                    "name a folder on a local disk (--out), or work in a checkout on one"
                ) from None
        if _is_named(path, file):  # or the writer before has removed it since it was opened
            return file
        file.close()


def _is_named(path: Path, lock: IO[str]) -> bool:
    """Whether an open lock is still the one of that name."""
    try:
        return os.path.samestat(_lock_of(path).lstat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """The same where a lock only saves work: wait for other processes, go on without where there are no locks."""
    with _lock_file(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with waiting(_busy(path, file)):
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            console.print(f"  {_lock_of(path)}: not locked ({error.strerror})", soft_wrap=True)
        _sign(file)
        yield


def is_locked(lock: Path) -> bool:
    """Whether some process holds the lock in this file; True too where the file system cannot tell."""
    try:
        with lock.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError) or error.errno in _NO_LOCKS
    return False


def wait_for_lock(file: IO[bytes]) -> None:
    """Lock an open file until it is closed; nothing is done where its file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _lock_file(path: Path) -> IO[str]:
    """Raises ExportError: it is a link, and what that names would be overwritten."""
    lock = _lock_of(path)
    try:
        return os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ExportError(f"{lock}: a link, which no build of ours makes; remove it") from None
        raise


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _busy(path: Path, lock: IO[str]) -> str:
    return f"{path}: process {lock.read().strip()} is writing it"


def _sign(lock: IO[str]) -> None:
    """Leave this process's number for those who find the lock held."""
    lock.seek(0)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, through a new file beside it; a link of that name is replaced, not followed."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    new = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        new.chmod(0o644)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def expanded(path: str | Path) -> Path:
    """A path with `~` as a shell reads it. Raises ExportError: no such home, and a folder named `~` is not meant."""
    text = os.path.expanduser(path)  # noqa: PTH111  (Path's own raises another error)
    if str(text).startswith("~"):
        raise ExportError(f"{path}: no home folder of that name is known; give the whole path")
    return Path(text)


def require_utf8(text: str) -> str:
    """The text of a path or an argument; libraries and JSON take nothing but UTF-8.

    Raises ExportError: it holds other bytes, which Python stands in for by half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        remedy = "give it in UTF-8, a path renamed" if sys.getfilesystemencoding() == "utf-8" else "set PYTHONUTF8=1"
        raise ExportError(f"{text!r}: not in the encoding {sys.getfilesystemencoding()}; {remedy}") from None
    return text


def cache_folder(preferred: Path) -> Path:
    """Where results may be cached: the preferred folder, or the user's cache where that cannot be written.

    Raises ExportError: neither can be.
    """
    if (folder := writable_folder(preferred)) != preferred:
        console.print(f"  {preferred}: cannot be written; the cache is {folder}", soft_wrap=True)
    return folder


def writable_folder(preferred: Path) -> Path:
    """The same without a word. Raises ExportError."""
    if _is_writable(preferred):
        return preferred
    own = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llama-on-device"  # noqa: PTH111
    if own.is_absolute() and _is_writable(own):  # `~` stays where a user has neither HOME nor a name
        return own
    raise ExportError(f"{preferred}: cannot be written, nor can {own}; name a folder for the cache in XDG_CACHE_HOME")


def _is_writable(folder: Path) -> bool:
    there = _existing(folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn whatever a writer raises because the disk of `folder` is full into one line that says so.

    Native writers raise all kinds of errors then, so the free space is checked too.
    """
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        if not is_full(error) and free_bytes(folder) >= _ALMOST_FULL_BYTES:
            raise
        reason = " ".join(str(error).split())
        raise FullError(f"{folder}: the disk is full ({reason}); free some space and run again") from None


def is_full(error: Exception) -> bool:
    """Whether an error says that a disk has no room left."""
    return isinstance(error, FullError) or (isinstance(error, OSError) and error.errno in FULL)


def require_file(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin when the result is one file larger than the shell allows."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < needed_bytes:
        raise ExportError(
            f"{folder}: needs a file of {megabytes(needed_bytes)} MB, files are limited to {megabytes(limit)} MB here "
            "(ulimit -f); raise the limit"
        )


def require_room(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin when the disk of `folder` has less room than will be written."""
    if (free := free_bytes(folder)) < needed_bytes:
        missing = megabytes(needed_bytes - free)
        raise ExportError(
            f"{folder}: needs {megabytes(needed_bytes)} MB on the disk, has {megabytes(free)} MB; free {missing} MB"
            f"{_PURGEABLE if sys.platform == 'darwin' else ''}"
        )


def free_bytes(folder: Path) -> int:
    """Free space where the folder is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def device(folder: Path) -> int:
    """Number of the disk that the folder is, or will be, on."""
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    """The folder or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def size(size_bytes: int) -> str:
    """For people: `3.4 GB`, `2.1 MB`; a GB is a thousand million bytes."""
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e8 else f"{megabytes(size_bytes)} MB"


def megabytes(size_bytes: int) -> str:
    """For people: 1 MB is a million bytes."""
    return f"{size_bytes / 1e6:,.1f}"


@contextmanager
def scratch(folder: Path) -> Iterator[None]:
    """Have libraries put their temporary files into `folder`, which is removed at the end.

    The system's temporary folder may be small or in memory, and there the files of a killed process would stay. What a
    library noted of `folder` in the environment goes with it: torch would make its compiler's cache there again.
    """
    before = tempfile.tempdir
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        for name in [name for name, value in os.environ.items() if value.startswith(f"{folder}{os.sep}")]:
            del os.environ[name]
        shutil.rmtree(folder, ignore_errors=True)


# ── the cache's limit ───────────────────────────────────────────────────────────────────────────────────────────────


class Limit(Strict):
    """`configs/cache.yaml`."""

    name: str
    limit_gb: PositiveNumber
    """GB (10⁹ bytes) of build/cache."""


@dataclass(frozen=True)
class _Entry:
    """One file or folder directly in the cache; it is removed as a whole."""

    path: Path
    bytes: int
    used: float
    """Seconds since the epoch."""


def used(path: Path) -> None:
    """Mark a file of the cache as used now."""
    os.utime(path)


def trim(cache: Path) -> None:
    """Remove the least recently used entries until the folder is within its limit."""
    limit = load_record(Limit, CONFIGS / "cache.yaml").limit_gb * 1e9
    oldest_first = sorted(_entries(cache), key=lambda entry: entry.used)
    total, removed = sum(entry.bytes for entry in oldest_first), 0
    for entry in oldest_first:
        if total - removed <= limit or entry.used > time.time() - _IN_USE_S:
            break
        shutil.rmtree(entry.path, ignore_errors=True) if entry.path.is_dir() else entry.path.unlink(missing_ok=True)
        removed += entry.bytes
    if removed:
        console.print(
            f"  {cache}: {size(removed)} not used for longest removed (configs/cache.yaml: {size(int(limit))})"
        )


def _entries(cache: Path) -> Iterator[_Entry]:
    for path in cache.iterdir() if cache.is_dir() else ():
        if path.suffix == ".lock":  # a lock that is removed could be held twice
            continue
        with suppress(FileNotFoundError):  # another process replaced it, or trims too
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            states = [file.stat() for file in files]
            if total := sum(state.st_size for state in states):
                yield _Entry(path, total, max(state.st_mtime for state in states))
