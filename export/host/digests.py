"""What "changed" means: digests of files, and of our own code by rooms. Imports no torch.

A room's files are one key: what some rooms compute from a checkpoint stays valid as long as their digest is the same,
so no list of files has to be maintained beside the code.
"""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

EXPORT = Path(__file__).parents[1]
MEMO = EXPORT.parent / "build" / "digests"
SETTLED_NS = 2_000_000_000
"""A file that changed more recently may change again within the same tick of its file system's clock."""
CODE = (".py", ".j2", ".cpp", ".h", ".cmake", ".txt")
"""Suffixes of code; data has keys of its own."""
_TOOLBOX = "toolbox"
"""The room that works on finished artifacts; all others decide what an artifact is."""


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read now: for files whose damage must be seen."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """Hex digest of a checkpoint's file, whose gigabytes are not read again while path, inode, size and times stay.

    Not for an artifact's files: a bit that flips on the disk changes none of these.
    """
    state = path.stat()
    stamp = f"{path.resolve()}|{state.st_ino}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}"
    note = MEMO / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    with suppress(OSError, ValueError):  # not there, or cut off while it was written
        return str(json.loads(note.read_text(encoding="utf-8")))
    digest = sha256(path)
    if time.time_ns() - state.st_ctime_ns > SETTLED_NS:
        with suppress(OSError):  # a full disk, a foreign folder: read again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(digest), encoding="utf-8")
    return digest


def room_digest(*rooms: str) -> str:
    """sha256 over the code of rooms of export/: folders, or modules at its top.

    Raises FileNotFoundError: no such room.
    """
    return code_digest(*(EXPORT / room for room in rooms))


def artifact_digest() -> str:
    """sha256 over all code that decides an artifact; the values of configs/ are in the resolved plan."""
    return code_digest(*(path for path in EXPORT.iterdir() if path.name != _TOOLBOX))


def code_digest(*paths: Path) -> str:
    """sha256 over the names and contents of all code in some files and folders."""
    digest = hashlib.sha256()
    named = {(file.relative_to(path.parent).as_posix(), file) for path in paths for file in code(path)}
    for name, file in sorted(named):
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def code(path: Path) -> list[Path]:
    """Every file of code in a folder, or the file itself."""
    if not path.exists():
        raise FileNotFoundError(path)
    return [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.suffix in CODE]
