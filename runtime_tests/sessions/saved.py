"""A filled KV cache as a file (docs/runner.md). Copied to devices: needs only Python 3.9 and numpy.

A stranger's file is numbers and text: nothing of it is run, and its sizes are checked before memory is taken.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from .base import CacheError, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC, _VERSION = b"KVCACHE\n", 1
_HEAD = struct.Struct("<8sI32sII")
"""Magic, version, sha256 of the artifact's manifest.json, tokens, bytes of the note.

Behind it: the tokens, 4 bytes each; the note; for each buffer, in the order of the contract, as many slots as tokens;
the CRC-32 of all that. Everything is little-endian.
"""
_CRC = struct.Struct("<I")
_MOST_NOTE = 2**24
_PIECE = 2**20


class SavedError(ValueError):
    """A file that cannot be written, or is no saved cache of this artifact. The line says what helps."""


def save(session: Session, path: Path, artifact: bytes, note: bytes = b"") -> int:
    """Write the tokens of a session and the slots that they fill, whole or not at all; bytes of the file.

    `artifact`: sha256 of its manifest. Raises SavedError: the runtime keeps its cache to itself, the file is something
    else's, or cannot be written.
    """
    if left := len(session.left) or session.oldest:  # what they did to those that stay, no token in the file tells
        raise SavedError(f"{left} older tokens have left this cache, by its policy; save before any has")
    try:
        buffers = [*session.buffers().items()]
    except CacheError as error:
        raise SavedError(str(error)) from None
    tokens = np.asarray(session.tokens, "<u4")
    crc = size = 0
    try:
        _refuse_other(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                head = _HEAD.pack(_MAGIC, _VERSION, artifact, len(tokens), len(note))
                for part in chain(
                    (head, tokens.tobytes(), note), (slots[: len(tokens)].tobytes() for _, slots in buffers)
                ):
                    crc, size = zlib.crc32(part, crc), size + len(part)
                    file.write(part)
                file.write(_CRC.pack(crc))
                file.close()
                Path(file.name).replace(path)
            except BaseException:
                with suppress(OSError):
                    Path(file.name).unlink()
                raise
    except OSError as error:
        raise SavedError(f"{path}: cannot be written: {error.strerror}") from None
    return size + _CRC.size


def _refuse_other(path: Path) -> None:
    """Only a saved cache is replaced. Raises SavedError."""
    if path.is_file():
        with path.open("rb") as file:
            known = file.read(len(_MAGIC)) == _MAGIC
    if path.exists() and not (path.is_file() and known):
        raise SavedError(f"{path}: is there and no saved session; choose another name")


def restore(session: Session, path: Path, artifact: bytes) -> bytes:
    """Fill a session's cache from a file; the note in it.

    Raises SavedError, the cache being as it was: no saved cache, damaged, another artifact's, another version's, or
    longer than the context. Where the disk fails between two readings, the cache is empty.
    """
    try:
        buffers = [*session.buffers().items()]
    except CacheError as error:
        raise SavedError(str(error)) from None
    try:
        if not path.is_file():  # to open a pipe would wait for its writer
            raise SavedError(f"{path}: {'no file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            count, note_bytes = _checked(file, path, session, artifact, sum(_slot_bytes(b) for _, b in buffers))
            tokens = np.frombuffer(_exactly(file, 4 * count), "<u4")
            if count and int(tokens.max()) >= session.vocab_size:
                raise SavedError(f"{path}: damaged: token {tokens.max()}, the vocabulary has {session.vocab_size}")
            note = _exactly(file, note_bytes)
            session.reset()
            for name, slots in buffers:
                part = np.frombuffer(_exactly(file, count * _slot_bytes(slots)), slots.dtype)
                session.write(0, {name: part.reshape(count, *slots.shape[1:])})
            session.tokens = tokens.tolist()
    except OSError as error:
        raise SavedError(f"{path}: cannot be read: {error.strerror}") from None
    return note


def _checked(file: IO[bytes], path: Path, session: Session, artifact: bytes, slot_bytes: int) -> tuple[int, int]:
    """Tokens and bytes of the note, after every check; the file stands behind its head."""
    head, size = file.read(_HEAD.size), os.fstat(file.fileno()).st_size
    if not head.startswith(_MAGIC) or len(head) < _HEAD.size:
        raise SavedError(f"{path}: no saved session")
    _, version, made_with, count, note_bytes = _HEAD.unpack(head)
    if version != _VERSION:
        raise SavedError(f"{path}: a saved session of version {version}, this program reads {_VERSION}; save it again")
    if made_with != artifact:
        raise SavedError(
            f"{path}: saved with another artifact (manifest {made_with.hex()[:12]}, this one's {artifact.hex()[:12]}); "
            "load it with the one that it was saved with"
        )
    if count > session.room:
        raise SavedError(f"{path}: {count} tokens, the KV cache has room for {session.room}")
    expected = _HEAD.size + 4 * count + note_bytes + count * slot_bytes + _CRC.size
    if size != expected or note_bytes > _MOST_NOTE:
        raise SavedError(f"{path}: damaged: {size} bytes instead of {expected}; copy or save it again")
    crc, left = zlib.crc32(head), size - _HEAD.size - _CRC.size
    while left:
        piece = _exactly(file, min(_PIECE, left))
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    if _exactly(file, _CRC.size) != _CRC.pack(crc):
        raise SavedError(f"{path}: damaged: its CRC-32 is another; copy or save it again")
    file.seek(_HEAD.size)
    return count, note_bytes


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise OSError(0, "it became shorter")
    return data


def _slot_bytes(slots: NDArray[Any]) -> int:
    return slots.dtype.itemsize * int(np.prod(slots.shape[1:]))
