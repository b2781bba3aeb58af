"""Files to and from a device: whole or not at all, with the same sha256 at both ends."""

import hashlib
import os
import re
import tarfile
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import Completed, DeviceError, NoSpaceError, TransferError
from . import shell as scripts
from .processes import Deadline
from .shell import Shell, quoted

_MAGIC = b"\x7fELF"
_MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_FAMILIES = {
    "arm64": "aarch64",
    "arm64-v8a": "aarch64",
    "armeabi-v7a": "arm",
    "armv7l": "arm",
    "amd64": "x86_64",
    "AMD64": "x86_64",
    "i686": "x86",
}
"""A system's name of an ABI → the name used here; the others are the same."""
_SPARE_BYTES = 2**20
"""Left free: file systems need room for names, too."""
_GREETING_BYTES = 2**20
"""What a shell may print around a file."""
SMALL_BYTES = 2**20
"""Files below it go together in one archive: each by itself costs a shell there, a second of some devices."""
_ROOT = ""
"""The relative name of a file that is pushed by itself."""


def family(abi: str) -> str:
    """One name for each family of processors: macOS says arm64, Android arm64-v8a, Linux aarch64."""
    return _FAMILIES.get(abi, abi)


def machine(path: Path) -> str | None:
    """The processor family of a program or library; None for any other file."""
    with path.open("rb") as file:
        header = file.read(20)
    if len(header) < 20 or header[:4] != _MAGIC:
        return None
    number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return _MACHINES.get(number, f"ELF machine {number}")


def runs(path: Path, abi: str) -> bool:
    """Whether a device of this ABI can load the file; True for files that are not programs."""
    needed = machine(path)
    return needed is None or needed == family(abi)


@dataclass(frozen=True)
class _Survey:
    free_bytes: int
    hashes: dict[str, str]
    """Path → sha256, of every file at or below the names."""

    def below(self, name: str) -> dict[str, str]:
        """Relative path → sha256; a file's own path is _ROOT."""
        return {
            path[len(name) + 1 :]: digest
            for path, digest in self.hashes.items()
            if path == name or path.startswith(f"{name}/")
        }


def _survey(shell: Shell, names: tuple[str, ...], deadline: Deadline) -> _Survey:
    step = f"hashing {quoted(names)}" if names else "asking for its free space"
    ended = shell.ask(scripts.survey(names), deadline, step=step)
    lines = ended.stdout.decode(errors="replace").splitlines()
    free = re.search(r"\s([0-9]{1,18})\s+([0-9]+%|-)", lines[1]) if len(lines) > 1 else None
    if ended.returncode or not free:
        raise DeviceError(f"{shell.link.name}: {shell.folder} cannot be read: {ended.reason}")
    hashes = {path: digest for digest, _, path in (line.partition("  ") for line in lines[2:])}
    return _Survey(int(free[1]) * 1024, hashes)


def push(shell: Shell, files: Mapping[str, Path], remote: str, deadline: Deadline) -> None:
    """Copy a file or the files of a folder (`listing`) to NAME.part, leave out what the device has, check, rename."""
    digests = {name: _sha256(path) for name, path in files.items()}
    survey = _survey(shell, (remote, f"{remote}.part"), deadline)
    present, part = survey.below(remote), survey.below(f"{remote}.part")
    if present == digests:
        return
    sent = {name for name, digest in part.items() if digests.get(name) == digest}
    reused = {name for name, digest in present.items() if digests.get(name) == digest} - sent
    missing = {name: path for name, path in files.items() if name not in sent | reused}
    check_room(shell, missing, survey.free_bytes)
    _prepare(shell, remote, deadline, names=set(files), wrong=part.keys() - sent, reused=reused)
    small = {name: path for name, path in missing.items() if name != _ROOT and path.stat().st_size < SMALL_BYTES}
    if small:
        _send_together(shell, small, f"{remote}.part", deadline)
    for name, path in missing.items():
        if name not in small:
            _send(shell, path, _join(f"{remote}.part", name), deadline)
    _finish(shell, remote, digests, files, deadline)


def listing(local: Path, only: Collection[str] | None = None) -> dict[str, Path]:
    """Relative name → file, of a folder those in `only`. Raises DeviceError for names that a shell tool changes."""
    if local.is_dir():
        files = {path.relative_to(local).as_posix(): path for path in sorted(local.rglob("*")) if path.is_file()}
    elif local.is_file():
        files = {_ROOT: local}
    else:
        raise DeviceError(f"{local}: no such file or folder to push")
    files = {name: path for name, path in files.items() if only is None or name in only}
    for name in files:
        if "\n" in name or "\\" in name:
            raise DeviceError(f"{name!r}: a file name with a newline or a backslash cannot be pushed")
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if name else folder


def check_room(shell: Shell, files: Mapping[str, Path], free_bytes: int) -> None:
    """Raise NoSpaceError before the first byte is sent."""
    needed = sum(path.stat().st_size for path in files.values())
    if files and needed + _SPARE_BYTES > free_bytes:
        raise NoSpaceError(
            f"{shell.link.name}: {needed / 1e6:.1f} MB to send, {free_bytes / 1e6:.1f} MB free in {shell.folder}; "
            f"free some space on the device"
        )


def _prepare(
    shell: Shell, remote: str, deadline: Deadline, *, names: set[str], wrong: set[str], reused: set[str]
) -> None:
    """Make NAME.part with its folders: remove the wrong files in it, take over those that NAME already has."""
    part = f"{remote}.part"
    folders = sorted({str(PurePosixPath(_join(part, name)).parent) for name in names} - {"."})
    lines = [f"rm -rf {quoted([_join(part, name)])}" for name in sorted(wrong)]
    if folders:
        lines.append(f"mkdir -p {quoted(folders)}")
    for name in sorted(reused):
        pair = quoted([_join(remote, name), _join(part, name)])
        # Hard links cost no room; Android forbids them to the shell user.
        lines.append(f"ln {pair} 2>/dev/null || cp {pair} || exit 1")
    ended = shell.ask("\n".join(lines), deadline) if lines else None
    if ended and ended.returncode:
        raise _failure(shell, part, ended, deadline)


def _send(shell: Shell, path: Path, remote: str, deadline: Deadline) -> None:
    with path.open("rb") as file:
        ended = shell.ask(f"cat >{quoted([remote])}", deadline, stdin=file, step=f"sending {path.name}")
    if ended.returncode:
        raise _failure(shell, remote, ended, deadline)


def _send_together(shell: Shell, files: Mapping[str, Path], folder: str, deadline: Deadline) -> None:
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name, path in files.items():
                with path.open("rb") as content:
                    member = archive.gettarinfo(arcname=_join(folder, name), fileobj=content)
                    member.mode = 0o644
                    archive.addfile(member, content)
        file.seek(0)
        ended = shell.ask("tar -xomf -", deadline, stdin=file, step=f"sending {len(files)} small files")
    if ended.returncode:
        raise _failure(shell, folder, ended, deadline)


def _failure(shell: Shell, remote: str, ended: Completed, deadline: Deadline) -> DeviceError:
    """Why a file could not be written: measured free space decides, not the message."""
    free_bytes = _survey(shell, (), deadline).free_bytes
    _remove(shell, remote, deadline)
    if free_bytes < _SPARE_BYTES:
        return NoSpaceError(
            f"{shell.link.name}: {shell.folder} is full ({free_bytes / 1e6:.1f} MB free); free some space"
        )
    return TransferError(f"{shell.link.name}: {remote} could not be written: {ended.reason}")


def _remove(shell: Shell, remote: str, deadline: Deadline) -> None:
    shell.ask(f"rm -rf {quoted([remote])}", deadline)


def _finish(
    shell: Shell, remote: str, digests: Mapping[str, str], files: Mapping[str, Path], deadline: Deadline
) -> None:
    """Check NAME.part and give it its final name; programs stay executable."""
    part, old = f"{remote}.part", f"{remote}.old"
    programs = [_join(part, name) for name, path in files.items() if os.access(path, os.X_OK)]
    lines = [scripts.check_hashes({_join(part, name): digest for name, digest in digests.items()})]
    if programs:
        lines.append(f"chmod 755 {quoted(programs)} || exit 1")
    lines.append(f"rm -rf {quoted([old])}")
    in_the_way = "-d" if _ROOT in files else "-e"  # a file replaces a file in one step
    lines.append(f"[ ! {in_the_way} {quoted([remote])} ] || mv {quoted([remote, old])} || exit 1")
    lines.append(f"mv -f {quoted([part, remote])} && rm -rf {quoted([old])}")
    ended = shell.ask("\n".join(lines), deadline, step=f"checking {remote}")
    if ended.returncode:
        arrived = _survey(shell, (part,), deadline).below(part)
        wrong = [_join(remote, name) for name in digests if arrived.get(name) != digests[name]]
        _remove(shell, part, deadline)
        if wrong:
            raise TransferError(f"{shell.link.name}: {', '.join(wrong)} did not arrive as sent; run again")
        raise TransferError(f"{shell.link.name}: {remote} could not be renamed: {ended.reason}")


def pull(shell: Shell, remote: str, local: Path, deadline: Deadline, most_bytes: int) -> None:
    """Copy one file from the device beside its final place, check, rename."""
    expected = _survey(shell, (remote,), deadline).below(remote).get(_ROOT)
    if expected is None:
        raise DeviceError(f"{shell.link.name}: no file {remote} in {shell.folder}")
    with tempfile.NamedTemporaryFile(dir=local.parent, prefix=f".{local.name}.", delete=False) as file:
        part = Path(file.name)
        try:
            ended = shell.ask(
                f"cat {quoted([remote])}", deadline, step=f"fetching {remote}", most_bytes=most_bytes + _GREETING_BYTES
            )
            file.write(ended.stdout)
            file.flush()
            if ended.returncode or _sha256(part) != expected:
                raise TransferError(f"{shell.link.name}: {remote} did not arrive as it is there; run again")
            part.replace(local)
        finally:
            part.unlink(missing_ok=True)
