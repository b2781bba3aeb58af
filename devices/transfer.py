"""Files to and from a device, whole or not at all. Knows nothing of adb or ssh."""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import scripts
from .processes import Deadline
from .scripts import quoted
from .shell import Shell
from .transport import DeviceError, NoSpaceError, TransferError

SPARE_BYTES = 2**20
"""Kept free: file systems need room for names too."""
ROOT = ""
"""The relative name of a file that is pushed by itself."""


@dataclass(frozen=True)
class Survey:
    """What the device has."""

    free_bytes: int
    hashes: dict[str, str]
    """Path → sha256, of every file at or below the names asked for."""

    def below(self, name: str) -> dict[str, str]:
        """Relative path → sha256; a file is its own ROOT."""
        return {
            path[len(name) + 1 :]: digest
            for path, digest in self.hashes.items()
            if path == name or path.startswith(f"{name}/")
        }


def survey(shell: Shell, names: tuple[str, ...], deadline: Deadline) -> Survey:
    """Ask the device for its free space and its files."""
    what = f"hashing {quoted(names)}" if names else "asking for its room"
    ended = shell.ask(scripts.survey(names), deadline, what=what)
    lines = ended.stdout.decode(errors="replace").splitlines()
    free = re.search(r"\s(\d+)\s+\d+%", lines[1]) if len(lines) > 1 else None
    if ended.returncode or not free:
        raise DeviceError(f"{shell.link.name}: {shell.folder} cannot be read: {last_line(ended.stderr)}")
    hashes = {path: digest for digest, _, path in (line.partition("  ") for line in lines[2:])}
    return Survey(int(free[1]) * 1024, hashes)


def push(shell: Shell, local: Path, remote: str, deadline: Deadline) -> None:
    """Copy a file or a folder to NAME.part, leave out what the device has, check, rename."""
    files = listing(local)
    wanted = {name: sha256(path) for name, path in files.items()}
    part = f"{remote}.part"
    there = survey(shell, (remote, part), deadline)
    if there.below(remote) == wanted:
        return
    kept = {name for name, digest in there.below(remote).items() if wanted.get(name) == digest}
    sent = {name for name, digest in there.below(part).items() if wanted.get(name) == digest}
    missing = {name: path for name, path in files.items() if name not in kept | sent}
    check_room(shell, missing, there.free_bytes)
    prepare(shell, remote, (kept - sent, there.below(part).keys() - sent, set(files)), deadline)
    for name, path in missing.items():
        send(shell, path, join(part, name), deadline)
    finish(shell, remote, wanted, files, deadline)


def listing(local: Path) -> dict[str, Path]:
    """Relative name → file. Raises DeviceError for names that a device's shell tools would change."""
    if local.is_dir():
        files = {path.relative_to(local).as_posix(): path for path in sorted(local.rglob("*")) if path.is_file()}
    elif local.is_file():
        files = {ROOT: local}
    else:
        raise DeviceError(f"{local}: no such file or folder to push")
    for name in files:
        if "\n" in name or "\\" in name:
            raise DeviceError(f"{name!r}: a file name with a newline or a backslash cannot be pushed")
    return files


def sha256(path: Path) -> str:
    """The hash of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def join(folder: str, name: str) -> str:
    """A path on the device."""
    return f"{folder}/{name}" if name else folder


def check_room(shell: Shell, files: Mapping[str, Path], free_bytes: int) -> None:
    """Raise NoSpaceError before the first byte is sent."""
    needed = sum(path.stat().st_size for path in files.values())
    if files and needed + SPARE_BYTES > free_bytes:
        raise NoSpaceError(
            f"{shell.link.name}: {needed / 1e6:.1f} MB to send, {free_bytes / 1e6:.1f} MB free in {shell.folder}; "
            f"free some space on the device"
        )


def prepare(shell: Shell, remote: str, names: tuple[set[str], set[str], set[str]], deadline: Deadline) -> None:
    """Make NAME.part: remove what is wrong in it, take over what NAME already has."""
    kept, wrong, wanted = names
    part = f"{remote}.part"
    folders = sorted({str(PurePosixPath(join(part, name)).parent) for name in wanted} - {"."})
    lines = [f"rm -rf {quoted([join(part, name)])}" for name in sorted(wrong)]
    if folders:
        lines.append(f"mkdir -p {quoted(folders)}")
    for name in sorted(kept):
        pair = quoted([join(remote, name), join(part, name)])
        # Hard links cost no room; Android forbids them to the shell user.
        lines.append(f"ln {pair} 2>/dev/null || cp {pair} || exit 1")
    ended = shell.ask("\n".join(lines), deadline) if lines else None
    if ended and ended.returncode:
        raise failure(shell, part, ended.stderr, deadline)


def send(shell: Shell, path: Path, remote: str, deadline: Deadline) -> None:
    """One file, unchecked."""
    with path.open("rb") as file:
        ended = shell.ask(f"cat >{quoted([remote])}", deadline, stdin=file, what=f"sending {path.name}")
    if ended.returncode:
        raise failure(shell, remote, ended.stderr, deadline)


def failure(shell: Shell, remote: str, stderr: bytes, deadline: Deadline) -> DeviceError:
    """Why something could not be written; the room is asked, not the message."""
    free_bytes = survey(shell, (), deadline).free_bytes
    remove(shell, remote, deadline)
    if free_bytes < SPARE_BYTES:
        return NoSpaceError(
            f"{shell.link.name}: {shell.folder} is full ({free_bytes / 1e6:.1f} MB free); free some space"
        )
    return TransferError(f"{shell.link.name}: {remote} could not be written: {last_line(stderr)}")


def remove(shell: Shell, remote: str, deadline: Deadline) -> None:
    """Leave nothing of a failed copy."""
    shell.ask(f"rm -rf {quoted([remote])}", deadline)


def finish(shell: Shell, remote: str, wanted: Mapping[str, str], files: Mapping[str, Path], deadline: Deadline) -> None:
    """Check NAME.part and give it its final name; programs stay executable."""
    part, old = f"{remote}.part", f"{remote}.old"
    programs = [join(part, name) for name, path in files.items() if os.access(path, os.X_OK)]
    lines = [scripts.check_hashes({join(part, name): digest for name, digest in wanted.items()})]
    if programs:
        lines.append(f"chmod 755 {quoted(programs)} || exit 1")
    lines.append(f"rm -rf {quoted([old])}")
    if ROOT in files:  # a file takes the place of a file in one step
        lines.append(f"[ ! -d {quoted([remote])} ] || mv {quoted([remote, old])} || exit 1")
    else:
        lines.append(f"[ ! -e {quoted([remote])} ] || mv {quoted([remote, old])} || exit 1")
    lines.append(f"mv -f {quoted([part, remote])} && rm -rf {quoted([old])}")
    ended = shell.ask("\n".join(lines), deadline, what=f"checking {remote}")
    if ended.returncode:
        arrived = survey(shell, (part,), deadline).below(part)
        wrong = [join(remote, name) for name in wanted if arrived.get(name) != wanted[name]]
        remove(shell, part, deadline)
        if wrong:
            raise TransferError(f"{shell.link.name}: {', '.join(wrong)} did not arrive as sent; run again")
        raise TransferError(f"{shell.link.name}: {remote} could not be renamed: {last_line(ended.stderr)}")


def pull(shell: Shell, remote: str, local: Path, deadline: Deadline) -> None:
    """Copy one file from the device beside its final place, check, rename."""
    expected = survey(shell, (remote,), deadline).below(remote).get(ROOT)
    if expected is None:
        raise DeviceError(f"{shell.link.name}: no file {remote} in {shell.folder}")
    with tempfile.NamedTemporaryFile(dir=local.parent, prefix=f".{local.name}.", delete=False) as file:
        part = Path(file.name)
        try:
            ended = shell.ask(f"cat {quoted([remote])}", deadline, stdout=file, what=f"fetching {remote}")
            if ended.returncode or sha256(part) != expected:
                raise TransferError(f"{shell.link.name}: {remote} did not arrive as it is there; run again")
            part.replace(local)
        finally:
            part.unlink(missing_ok=True)


def last_line(text: bytes) -> str:
    """For messages."""
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"
