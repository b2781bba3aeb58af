"""An artifact folder is written whole or not at all: temporary folder, then rename, under a lock."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import disk, interrupt, manifest
from .errors import ExportError


@contextmanager
def building(out: Path, plan_id: str) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    The old artifact stays untouched until the rename. Raises ExportError: another build of `out` is running, `out`
    holds something else than an artifact of this plan, or the disk is full.
    """
    out = out.resolve()  # `.` has no name, and a link stays a link
    refuse_foreign(out, plan_id)
    make_parent(out)
    with disk.locked(out), disk.writing(out.parent):
        temporary, old = beside(out, "part"), beside(out, "old")
        bring_back(old, out)  # killed between the two renames
        refuse_foreign(out, plan_id)  # it may have come since
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            with disk.scratch(beside(out, "tmp")):
                yield temporary
            interrupt.check()
            if out.exists():
                out.rename(old)
            temporary.rename(out)
        except BaseException:
            bring_back(old, out)
            raise
        finally:
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)


def beside(out: Path, kind: str) -> Path:
    """A hidden neighbour of the finished folder, on the same disk."""
    return out.with_name(f".{out.name}.{kind}")


def bring_back(old: Path, out: Path) -> None:
    """The old artifact returns when nothing took its place."""
    if old.exists() and not out.exists():
        old.rename(out)


def make_parent(out: Path) -> None:
    """The folder that will hold the artifact."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{out.parent}: cannot be made ({error.strerror}); give another --out") from None


def refuse_foreign(out: Path, plan_id: str) -> None:
    """Never replace a folder that is not an artifact of the same plan."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / manifest.FILE).is_file()):
        raise ExportError(f"{out}: exists and is not an artifact folder; give another --out")
    if (out / manifest.FILE).is_file() and (there := manifest.read_id(out)) != plan_id:
        held = f"another artifact ({there})" if there else "a damaged artifact"
        raise ExportError(f"{out}: holds {held}; give another --out or remove it")
