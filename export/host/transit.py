"""What version control does to files on their way: pointers in place of large ones, other line ends in texts."""

import hashlib
from pathlib import Path

from export.errors import ExportError

_REPOSITORY = "in the clone that it is from"
_POINTERS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer", f"run `git lfs pull` {_REPOSITORY}"),
    (b"version https://hawser.github.com/spec/", "a Git LFS pointer", f"run `git lfs pull` {_REPOSITORY}"),
    (b"# xet version ", "a Xet pointer", "download the file itself, for example with `hf download`"),
    (b"/annex/objects/", "a git-annex pointer", f"run `git annex get` {_REPOSITORY}"),
)
"""What is left in place of a large file, by how it begins."""
_LARGEST_TEXT = 2**27
"""Bytes; the largest tokenizer.json has a quarter of that."""


def pointer(path: Path) -> str:
    """`is a Git LFS pointer, not the file; run …`; empty for every other file."""
    with path.open("rb") as file:
        first = file.read(64)
    found = (f"is {kind}, not the file; {remedy}" for begin, kind, remedy in _POINTERS if first.startswith(begin))
    return next(found, "")


def require_no_pointer(path: Path) -> None:
    """Raises ExportError: the file is a pointer."""
    if text := pointer(path):
        raise ExportError(f"{path}: {text}")


def has_other_line_ends(path: Path, sha256: str) -> bool:
    """Whether a file has the digest once its line ends are LF, or CRLF."""
    if path.stat().st_size > _LARGEST_TEXT:
        return False
    unix = path.read_bytes().replace(b"\r\n", b"\n")
    return sha256 in {hashlib.sha256(text).hexdigest() for text in (unix, unix.replace(b"\n", b"\r\n"))}
