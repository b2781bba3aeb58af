"""huggingface_hub's cache: a file's name there is the digest that the hub gives for it. The library trusts the size.

A snapshot's files are links to `blobs/DIGEST`: sha256 of a large file, git's blob id (sha1) of a small one
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

import hashlib
from pathlib import Path

from ..errors import ExportError

CHUNK_BYTES = 2**20


def require_whole(snapshot: Path) -> None:
    """Every file has the bytes of its digest. Raises ExportError: damaged on the way or on the disk.

    A hub whose digests are no such thing (a mirror's own) cannot be checked; what it gave is taken as it is.
    """
    for path in sorted(snapshot.rglob("*")):
        digest = path.resolve().name
        if path.is_file() and digest_of(path, digest) != digest:
            raise ExportError(
                f"{path}: not the bytes that the hub promised ({digest[:12]}…); remove {path.resolve()} and run again"
            )


def digest_of(path: Path, promised: str) -> str:
    """The digest of the same kind as the promised one; of another kind, the promised one."""
    if not set(promised) <= set("0123456789abcdef") or len(promised) not in (40, 64):
        return promised
    with path.open("rb") as file:
        if len(promised) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while chunk := file.read(CHUNK_BYTES):
            blob.update(chunk)
        return blob.hexdigest()
