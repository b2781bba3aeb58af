"""An artifact folder is written whole or not at all: temporary folder, then rename, under a lock."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export import manifest
from export.errors import ExportError
from export.host import disk, interrupt


@contextmanager
def building(out: Path, plan_id: str) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends well and is removed when it does not.

    The old artifact stays untouched until the rename. Raises ExportError: another build of `out` is running, `out`
    holds anything but an artifact of this plan, or the disk is full.
    """
    out = out.resolve()  # `.` has no name, and a link stays a link
    disk.require_utf8(str(out))
    _refuse_foreign(out, plan_id)
    _make_parent(out)
    with disk.locked(out), disk.writing(out.parent):
        temporary, old = beside(out, "part"), beside(out, "old")
        _bring_back(old, out)  # killed between the two renames
        _refuse_foreign(out, plan_id)  # it may have come since
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
            _bring_back(old, out)
            raise
        finally:
            _carry_over(old, out)
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)


def beside(out: Path, kind: str) -> Path:
    """A hidden neighbour of the finished folder, on the same disk."""
    return out.with_name(f".{out.name}.{kind}")


def _bring_back(old: Path, out: Path) -> None:
    if old.exists() and not out.exists():
        old.rename(out)


def _carry_over(old: Path, out: Path) -> None:
    """Leave to the new artifact what git, hubs and file managers put beside the old one."""
    for path in manifest.companions(old):
        if path.parent == old and not (out / path.name).exists():
            path.rename(out / path.name)


def _make_parent(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{out.parent}: cannot be made ({error.strerror}); give another --out") from None


def _refuse_foreign(out: Path, plan_id: str) -> None:
    """Never replace anything but an artifact of the same plan, nor what somebody put into its folder."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / manifest.FILE).is_file()):
        raise ExportError(f"{out}: exists and is not an artifact folder; give another --out")
    if (out / manifest.FILE).is_file() and (held_id := manifest.read_id(out)) != plan_id:
        content = f"another artifact ({held_id})" if held_id else "a damaged artifact"
        raise ExportError(f"{out}: holds {content}; give another --out or remove it")
    if foreign := next(manifest.unlisted(out), None):
        raise ExportError(
            f"{foreign}: not part of the artifact that is built again; move it away, or give another --out"
        )
