"""An artifact folder is written whole or not at all: temporary folder, then rename, under a lock."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import manifest
from .errors import ExportError


@contextmanager
def building(out: Path, plan_id: str) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    The old artifact stays untouched until the rename. Raises ExportError: another build of `out` is running, or
    `out` holds something else than an artifact of this plan.
    """
    refuse_foreign(out, plan_id)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{out.parent}: cannot be made ({error.strerror}); give another --out") from None
    with locked(out):
        temporary, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
        for leftover in (temporary, old):  # a killed build; the lock says nobody works on it
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            if out.exists():
                out.rename(old)
            temporary.rename(out)
        finally:
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """An advisory lock on `.NAME.lock` beside `out`; the kernel frees it when the process ends."""
    path = out.with_name(f".{out.name}.lock")
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ExportError(f"{out}: process {file.read().strip()} is building it; wait for it to end") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def refuse_foreign(out: Path, plan_id: str) -> None:
    """Never replace a folder that is not an artifact of the same plan."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / manifest.FILE).is_file()):
        raise ExportError(f"{out}: exists and is not an artifact folder; give another --out")
    if (out / manifest.FILE).is_file() and (there := manifest.read_id(out)) != plan_id:
        raise ExportError(
            f"{out}: holds another artifact ({there or 'unreadable manifest'}); give another --out or remove it"
        )
