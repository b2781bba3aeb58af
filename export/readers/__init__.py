"""Reads model files of one format each, ours or another exporter's, without running them: one module per backend.

A module has the name of the backend whose files it reads.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

from ..contents import Contents
from ..errors import ExportError
from ..plan import Architecture


class Reader(Protocol):
    """A module of this package. What is raised for a damaged file may be any exception; `contents` here names it."""

    FORMAT: str

    def recognizes(self, path: Path) -> bool:
        """Whether the first bytes, or the files of a folder, say that this is the format."""

    def contents(self, path: Path, architecture: Architecture | None) -> Contents:
        """Everything the file tells. With an architecture the tensors of our own artifacts get our names."""

    def escapes(self, path: Path) -> Iterator[str]:
        """Every reference inside the file to something outside its folder, in words; nothing is opened to find out."""

    def structure(self, path: Path) -> Iterator[str]:
        """What the format's own rules say is wrong, in words. May end this process: native code reads the file."""


def names() -> list[str]:
    """Every format that can be read."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Reader:
    """The reader of a backend's files; nothing else is imported."""
    if name not in names():
        raise ExportError(f"unknown format {name!r}; known: {', '.join(names())}")
    return cast(Reader, importlib.import_module(f"{__name__}.{name}"))


def recognize(path: Path) -> Reader:
    """The reader of a bare file or package."""
    readers = [load(name) for name in names()]
    found = next((reader for reader in readers if reader.recognizes(path)), None)
    if found is None:
        known = ", ".join(reader.FORMAT for reader in readers)
        raise ExportError(f"{path}: neither an artifact folder nor a file of a known format ({known})")
    return found


def contents(reader: Reader, path: Path, architecture: Architecture | None) -> Contents:
    """Read a file; whatever its parser makes of a damaged one is one line."""
    if not (path.is_file() or path.is_dir()):
        raise ExportError(f"{path}: missing; build the artifact again")
    try:
        return reader.contents(path, architecture)
    except (ExportError, OSError):
        raise
    except Exception as error:  # parsers of foreign formats raise what they like
        raise ExportError(f"{path}: not readable as {reader.FORMAT}: {in_a_line(error)}") from None


def in_a_line(error: BaseException) -> str:
    """An exception of a library, short."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def head(path: Path, count: int) -> bytes:
    """The first bytes of a regular file; of anything else, none."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(count)


def outside(folder: Path, reference: str) -> str | None:
    """Why a reference found inside a file of a folder must not be followed; None: it stays in the folder."""
    parts = reference.replace("\\", "/").split("/")
    if reference.startswith(("/", "\\")) or ":" in parts[0]:
        return "is absolute"
    if ".." in parts:
        return "climbs out with `..`"
    if not reference or "\0" in reference:
        return "is no file name"
    step = folder
    for part in parts:
        step /= part
        if step.is_symlink():
            return "leads through a link"
    return None
