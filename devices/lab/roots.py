"""Root file systems of the emulated devices and the qemu that executes them, made from Debian packages and cached.

Nothing is installed on this machine: packages are extracted into folders under build/lab/, named by what is in them.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .machines import LabError, Machine

_LOG = logging.getLogger(__name__)
CACHE = Path(__file__).parents[2] / "build/lab"
_RELEASE = "bookworm"
_FORMAT = 1
"""To be raised when this file makes a different root of the same machine."""
_BUILD_LIMIT_S = 900
_MOUNT_POINTS = ("proc", "sys", "dev", "run", "tmp", "root")


def _mirror() -> str:
    """$DEBIAN_MIRROR, else the Debian mirror of this machine's own apt."""
    if chosen := os.environ.get("DEBIAN_MIRROR"):
        return chosen
    system = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    codename = system.get("VERSION_CODENAME", "").strip('"')
    if system.get("ID") == "debian":
        targets = ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"]
        for line in subprocess.run(targets, capture_output=True, text=True, check=True).stdout.splitlines():
            release, uri = line.split()
            if release == codename:
                return uri
    raise LabError("the lab needs a Debian mirror, and apt's sources here name none: set DEBIAN_MIRROR=http://…/debian")


def root_of(machine: Machine) -> Path:
    """The machine's root, made where it is missing."""
    return made(f"root-{_digest(asdict(machine))}", lambda folder: _make_root(machine, folder))


def qemu() -> Path:
    """The user-mode emulator, static: version 10, with which onnxruntime's arm64 wheel does not crash."""
    return made(f"qemu-{_digest({})}", _make_qemu) / "qemu-aarch64"


def _digest(recipe: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, _RELEASE, recipe], sort_keys=True).encode()).hexdigest()[:16]


def made(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder of that name; made beside its place and renamed, so that it is whole or absent."""
    final = CACHE.resolve() / name
    if final.exists():
        return final
    with _locked(), tempfile.TemporaryDirectory(prefix=".making-", dir=CACHE) as scratch:
        if not final.exists():
            folder = Path(scratch) / "root"
            make(folder)
            folder.chmod(0o755)
            try:
                folder.rename(final)
            except OSError:  # without a lock another builder may have been faster
                if not final.exists():
                    raise
    return final


@contextmanager
def _locked() -> Iterator[None]:
    """One builder at a time; the kernel frees the lock when its process ends. It saves work, no more."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _LOG.warning("%s: this file system has no locks (%s): go on without", file.name, error.strerror)
        yield


def _make_root(machine: Machine, folder: Path) -> None:
    """Extract the packages; no program of the device is executed."""
    _extract(machine.packages, "arm64", folder, backports=machine.backports)
    for name in (*_MOUNT_POINTS, machine.data):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, text in machine.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
    for name, target in machine.links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)


def _make_qemu(folder: Path) -> None:
    """One static binary out of Debian's package."""
    architecture = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True)
    whole = folder.with_name("whole")
    _extract(("qemu-user",), architecture.stdout.strip(), whole, backports=True)
    folder.mkdir()
    shutil.copy2(whole / "usr/bin/qemu-aarch64", folder)


def _extract(packages: tuple[str, ...], architecture: str, folder: Path, *, backports: bool) -> None:
    """Unpack packages with their dependencies."""
    source = _mirror()
    suites = [_RELEASE, f"{_RELEASE}-backports"] if backports else [_RELEASE]
    command = ["mmdebstrap", "--quiet", "--variant=extract", f"--architectures={architecture}"]
    command += [f"--include={','.join(packages)}", f'--aptopt=APT::Default-Release "{suites[-1]}"']
    command += [_RELEASE, str(folder), *(f"deb {source} {suite} main" for suite in suites)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_LIMIT_S, check=False)
    except FileNotFoundError:
        raise LabError("mmdebstrap is not installed: make lab") from None
    if ended.returncode:
        reasons = [line for line in ended.stderr.splitlines() if line.startswith("E:")]
        raise LabError(f"{', '.join(packages)} for {architecture}: {' '.join(reasons) or 'mmdebstrap failed'}")
