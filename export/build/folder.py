"""An artifact folder is written whole or not at all: a private folder beside it, then a rename, under a lock."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export import manifest
from export.checkpoints import whereabouts
from export.checkpoints.origin import Adapter, Origin, Seed, halves, telling
from export.errors import ExportError
from export.host import disk, interrupt
from export.host.console import note
from export.manifest import CheckpointInfo

from . import skip

_NEW, _OLD, _SCRATCH = "new", "old", "tmp"
"""In the private folder: what is written, what it replaces, and libraries' temporary files."""


@contextmanager
def building(out: Path, plan_id: str, origin: Origin) -> Iterator[Path]:
    """A fresh folder that becomes `out` when the block ends well and is removed when it does not.

    The old artifact stays untouched until the rename. Raises ExportError: another build of `out` is running, `out`
    holds anything but an artifact of this plan and checkpoint, or the disk is full.
    """
    out = out.resolve()  # `.` has no name, and a link stays a link
    disk.require_utf8(str(out))
    refuse_foreign(out, plan_id, origin)
    _make_parent(out)
    with disk.locked(out), disk.writing(out.parent):
        for leftover in _leftovers(out):
            _bring_back(leftover, out)  # killed between the two renames
            shutil.rmtree(leftover, ignore_errors=True)
        refuse_foreign(out, plan_id, origin)  # it may have come since
        if earlier := _earlier(out, origin):
            note(f"replaces the artifact of {earlier}")
        place = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        try:
            (place / _NEW).mkdir()
            with disk.scratch(place / _SCRATCH):
                yield place / _NEW
            interrupt.check()
            _set_modes(place / _NEW)
            if out.exists():
                out.rename(place / _OLD)
            (place / _NEW).rename(out)
        except BaseException:
            _bring_back(place, out)
            raise
        finally:
            _carry_over(place / _OLD, out)
            shutil.rmtree(place, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.build-"


def _leftovers(out: Path) -> list[Path]:
    """What killed builds of `out` left: folders of our names that hold what builds put there, and nothing else."""
    ours = re.compile(re.escape(_prefix(out)) + r"[a-z0-9_]{8}")  # as mkdtemp names them
    named = [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]
    return [path for path in named if not path.is_symlink() and path.is_dir() and _holds_a_build(path)]


def _holds_a_build(place: Path) -> bool:
    return all(path.name in (_NEW, _OLD, _SCRATCH) and path.is_dir() for path in place.iterdir())


def _bring_back(place: Path, out: Path) -> None:
    if (place / _OLD).exists() and not out.exists():
        (place / _OLD).rename(out)


def _set_modes(folder: Path) -> None:
    """Everybody may read an artifact and only its owner change it, whatever the umask of the build was."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


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


def refuse_foreign(out: Path, plan_id: str, origin: Origin) -> None:
    """Never replace anything but an artifact of the same plan and checkpoint, nor what somebody put into its folder.

    A checkpoint that was trained further where it was is the same one. Raises ExportError.
    """
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / manifest.FILE).is_file()):
        inside = out.is_dir() and any(out.glob(f"*/{manifest.FILE}"))
        other = f"--out {out / plan_id}" if inside else "another --out"
        raise ExportError(f"{out}: exists and is not an artifact folder; give {other}")
    if (out / manifest.FILE).is_file() and (held_id := manifest.read_id(out)) != plan_id:
        content = f"another artifact ({held_id})" if held_id else "a damaged artifact"
        raise ExportError(f"{out}: holds {content}; give another --out or remove it")
    held = manifest.read_checkpoint(out)
    if held and not _is_same(held, origin) and origin not in whereabouts.origins(held):
        raise ExportError(
            f"{out}: holds an artifact of another checkpoint, {_told(held, origin)}, not of {origin}; give this one a "
            "--name of its own, or remove the folder"
        )
    if foreign := next(manifest.unlisted(out), None):
        raise ExportError(
            f"{foreign}: not part of the artifact that is built again; move it away, or give another --out"
        )


def _is_same(held: CheckpointInfo, origin: Origin) -> bool:
    """Whether the bytes that an artifact was made of are those that are there now."""
    one_kind = bool(halves(held.origin)[0]) == isinstance(origin, Adapter)
    return one_kind and bool(held.sha256) and not any(skip.changed_files(held.sha256, origin))


def _told(held: CheckpointInfo, origin: Origin) -> str:
    """`local:my-model (model.safetensors 0123456789ab)`: by a file that the other checkpoint has not."""
    others = [change.name for change in skip.changed_files(held.sha256, origin) if change.name in held.sha256]
    file = telling(others or held.sha256)
    return f"{held.origin} ({file} {held.sha256[file][:12]})" if file else held.origin


def _earlier(out: Path, origin: Origin) -> str:
    """The earlier state of the checkpoint whose artifact is replaced; empty: there is none."""
    held = manifest.read_checkpoint(out)
    differs = held is not None and not _is_same(held, origin) and not isinstance(origin, Seed)
    return f"an earlier state of {origin}" if differs else ""
