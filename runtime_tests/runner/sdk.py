"""ExecuTorch's C++ SDK: headers and libraries of the installed wheel, or of the same wheel for another processor."""

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from export.errors import ExportError

Abi = Literal["x86-64", "aarch64"]
ABIS: tuple[Abi, ...] = ("x86-64", "aarch64")
MACHINES: dict[str, Abi] = {"x86_64": "x86-64", "AMD64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}
# The C++ libraries in a wheel do not depend on its Python version, so one is fetched for all.
WHEEL_OF = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311")
PLATFORMS: dict[Abi, tuple[str, ...]] = {
    "x86-64": ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64"),
    "aarch64": ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64"),
}
PARTS = ("executorch/lib/", "executorch/include/", "executorch/share/")


class UnavailableError(ExportError):
    """A tool or a download that a build needs is not to be had here; nothing is wrong with the sources."""


@dataclass(frozen=True)
class Sdk:
    """One SDK."""

    root: Path
    """The folder `executorch` of a wheel."""
    version: str
    origin: str
    """Says which bytes these are."""


def find(abi: Abi, cache: Path) -> Sdk:
    """The SDK for an ABI; downloaded into `cache` once where this machine's own wheel is for another one."""
    version, installed = installed_wheel()
    if MACHINES.get(platform.machine()) == abi and platform.system() == "Linux":
        return Sdk(installed, version, "installed")
    found = sorted(cache.glob(f"executorch-{version}-{abi}-*"))
    folder = found[0] if found else download(abi, version, cache)
    return Sdk(folder / "executorch", version, folder.name)


def installed_wheel() -> tuple[str, Path]:
    """Version and `executorch` folder of the environment; the package itself is not imported, it pulls in torch."""
    try:
        wheel = distribution("executorch")
    except PackageNotFoundError:
        raise ExportError(
            "executorch is not installed: the runner is built from its libraries; run make setup"
        ) from None
    return wheel.version, Path(str(wheel.locate_file("executorch"))).resolve()


def download(abi: Abi, version: str, cache: Path) -> Path:
    """Fetch the wheel of that version and unpack what a build needs; whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as scratch:
        platforms = [word for name in PLATFORMS[abi] for word in ("--platform", name)]
        command = ("pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
        done = subprocess.run(
            [sys.executable, "-m", *command, *WHEEL_OF, *platforms, "--dest", scratch, f"executorch=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UnavailableError(f"executorch {version} for {abi}: pip download failed: {last}")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(PARTS)])
        with wheels[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return settle(unpacked, cache / f"executorch-{version}-{abi}-{digest[:12]}")


def settle(finished: Path, place: Path) -> Path:
    """Rename a finished folder into its place; if another process was faster, its folder is the same."""
    try:
        finished.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(finished)
    return place
