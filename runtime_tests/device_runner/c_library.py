"""A C and C++ library for arm64 to bring along to devices, out of Debian's packages: for a compiler that has none."""

import hashlib
import io
import os
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from export.errors import ExportError

from . import sdk

_MIRROR = "http://deb.debian.org/debian"
_PACKAGES = {  # of Debian 12: 2.9 MB. Who changes them updates the sha256: `apt-cache show libc6:arm64`
    "glibc/libc6_2.36-9+deb12u14_arm64.deb": "01f4330719fd4f65580e16ea5a0527f372fca750e8f588d26deaf09f2d3b1cf4",
    "gcc-12/libgcc-s1_12.2.0-14+deb12u1_arm64.deb": "576926b283613db80168ddf76380a3bd877602778cf0d226caa7bfbfa71eacf3",
    "gcc-12/libstdc++6_12.2.0-14+deb12u1_arm64.deb": "26e138c677a985775331373828a6c286c551ff397cb735d00e2383cb273d1cb2",
}
IDENTITY = hashlib.sha256("".join(_PACKAGES.values()).encode()).hexdigest()[:12]
_TIMEOUT_S = 60
_MOST_BYTES = 2**24
_HEADER, _NAME, _SIZE = 60, slice(0, 16), slice(48, 58)
"""Of an entry of an ar archive, as a Debian package is one."""


def find(names: Sequence[str], cache: Path) -> list[Path]:
    """Files of the packages by their names; downloaded into `cache` once, whole or not at all."""
    place = cache / f"debian-arm64-{IDENTITY}"
    if not place.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as scratch:
            unpacked = Path(scratch) / "unpacked"
            unpacked.mkdir()
            for package, expected in _PACKAGES.items():
                for name, content in _files(_download(package, expected)):
                    if name in names:
                        (unpacked / name).write_bytes(content)
                        (unpacked / name).chmod(0o755)
            sdk.settle(unpacked, place)
    return [place / name for name in names]


def _download(package: str, expected: str) -> bytes:
    """The bytes of a package. Raises UnavailableError: the mirror has none; ExportError: it has another."""
    other = "DEBIAN_MIRROR=http://…/debian names another mirror"
    url = f"{os.environ.get('DEBIAN_MIRROR') or _MIRROR}/pool/main/{package[0]}/{package}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310  what it gives is known
            content: bytes = answer.read(_MOST_BYTES)
    except (OSError, ValueError, HTTPException) as error:
        raise sdk.UnavailableError(f"{url}: {error}; {other}") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise ExportError(f"{url}: its sha256 is not {expected}, nothing of it was kept; {other}")
    return content


def _files(package: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a package, links followed."""
    place = len(b"!<arch>\n")
    while place < len(package):
        header = package[place : place + _HEADER]
        size, place = int(header[_SIZE]), place + _HEADER
        if header[_NAME].startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(package[place : place + size])) as archive:
                for member in archive:
                    if (member.isfile() or member.issym()) and (content := _content(archive, member)) is not None:
                        yield PurePosixPath(member.name).name, content
        place += size + size % 2


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """None: a link to somewhere else."""
    try:
        file = archive.extractfile(member)
    except KeyError:
        return None
    return file.read() if file else None
