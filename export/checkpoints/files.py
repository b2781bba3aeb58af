"""A checkpoint's files before anybody parses them: what lies there in place of a file, told by its first bytes."""

import os
from collections.abc import Iterable
from pathlib import Path

from export.errors import ExportError, absence
from export.host import transit

_FIRST_BYTES = 512
_DOWNLOAD = "download the file itself, for example with `hf download`"
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head")
_ANSWERS = (b"entry not found", b"repository not found", b"invalid username", b"access to model", b'{"error"')
"""How web pages and a hub's refusals begin, which download programs save under the file's name."""
_FORMS = (
    (b"GGUF", "a GGUF file; give it under a name that ends in .gguf, with --source"),
    (b"PK\x03\x04", "a zip archive, as `torch.save` writes too; unpack it, or save the weights as safetensors"),
    (b"\x1f\x8b", "packed with gzip; unpack it"),
)
"""How other forms begin that are given under a name of this one."""
_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
"""How editors begin UTF-8 and UTF-16."""
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".download", ".aria2", ".tmp")
"""What download programs put behind a name until they are done."""
_HUB_DOWNLOADS = ".cache/huggingface/download"
"""Where `hf download --local-dir` keeps what has not arrived, under names of its own."""
GATHER = "it is empty: saved under DeepSpeed ZeRO-3 without gathering; save again with `zero_to_fp32.py`"
"""What to do about a tensor without numbers."""


def other_form(first: bytes) -> str | None:
    """What a file is by its first bytes, and what to do, where it is not what its name says."""
    return next((form for begin, form in _FORMS if first.startswith(begin)), None)


def decoded(text: bytes) -> str:
    """A text file's contents. Raises ValueError: not the UTF-8 without a mark that every client reads."""
    if text.startswith(_MARKS):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None


def first_bytes(path: Path) -> bytes:
    """Up to 512 of them. Raises ExportError: not readable."""
    try:
        with path.open("rb") as file:
            return file.read(_FIRST_BYTES)
    except OSError as error:
        raise ExportError(f"{path}: not readable ({error.strerror})") from None


def require_contents(path: Path) -> None:
    """Call before a file of a checkpoint is parsed.

    Raises ExportError: empty, a pointer of Git LFS, Xet or git-annex, a web page, or a download that has not ended.
    """
    first = first_bytes(path)
    if not first:
        raise ExportError(f"{path}: is empty; download it again")
    transit.require_no_pointer(path)
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_MARKUP):
        raise ExportError(f"{path}: is a web page, not the file; {_DOWNLOAD}")
    if text.startswith(_ANSWERS):
        answer = first.decode("utf-8", "replace").strip().partition("\n")[0]
        raise ExportError(f"{path}: is a server's answer {answer!r:.80}, not the file; {_DOWNLOAD}")
    if path.with_name(path.name + ".aria2").exists():
        raise ExportError(f"{path}: its download has not ended, as {path.name}.aria2 beside it says; finish it")


def require_inside(paths: Iterable[Path], folder: Path) -> None:
    """Links may lead anywhere inside a checkpoint's folder, and out of a hub's or Ollama's snapshot to its blobs.

    Raises ExportError: one leads elsewhere, so that a file of the user that is no part of the checkpoint would be read
    and shipped.
    """
    inside = folder.resolve()
    stores = {parent / "blobs" for parent in inside.parents}
    for path in paths:
        real = path.resolve()
        if not real.is_relative_to(inside) and real.parent not in stores:
            raise ExportError(f"{path}: a link out of the folder, to {real}; copy that file here if it belongs to it")


def missing(path: Path, remedy: str) -> ExportError:
    """An error about a file that must be there; a dangling link and an unfinished download are told as such."""
    if path.is_symlink():
        target = os.readlink(path)  # noqa: PTH115  (the text as it stands in the link)
        return ExportError(f"{path}: missing: it is a link to {target}, where no file is; download it again")
    for suffix in _UNFINISHED:
        if path.with_name(path.name + suffix).is_file():
            return ExportError(f"{path}: missing, only {path.name}{suffix} is there; finish the download")
    if any((path.parent / _HUB_DOWNLOADS).glob("*.incomplete")):
        return ExportError(f"{path}: missing, and a download into {path.parent} has not ended; run `hf download` again")
    return ExportError(f"{path}: {absence(path)}{remedy}")
