"""ExecuTorch's C++ SDK: of the installed wheel, of the same wheel for another processor, or one built for Android."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from devices import last_line
from devices.transports.transfer import family
from export.errors import ExportError
from export.host.digests import sha256
from export.manifest import ROOT

Abi = Literal["x86-64", "aarch64", "arm64-v8a"]
"""The last is Android's, with its own C library; the others are those of Linux, with GNU's."""
ABIS: tuple[Abi, ...] = ("x86-64", "aarch64", "arm64-v8a")
MACHINES: dict[str, Abi] = {"x86_64": "x86-64", "aarch64": "aarch64"}
"""Family of processors (`devices.transports.transfer.family`) → ABI."""
ANDROID = "LLAMA_EXECUTORCH"
"""The environment's variable that names an ExecuTorch installed for Android: where its own build put it."""
_VERSION = Path("include/executorch/runtime/core/version.h")
_ALLOCATOR = Path("include/executorch/extension/memory_allocator/malloc_memory_allocator.h")
"""ExecuTorch's own install leaves it out."""
LOCK = ROOT / "locks" / "release.txt"
"""Every package with the sha256 of its wheels, for all platforms and Pythons."""
_PYTHON = "3.11"
"""Of the wheel that is fetched: the C++ libraries in a wheel do not depend on its Python version."""
_CHANGED = "DO NOT MATCH THE HASHES"
"""pip's words."""
_PARTS = ("executorch/lib/", "executorch/include/", "executorch/share/")


class UnavailableError(ExportError):
    """A tool or a download that a build needs is missing here; nothing is wrong with the sources."""


@dataclass(frozen=True)
class Sdk:
    """Headers and libraries."""

    root: Path
    """The folder `executorch` of a wheel, or the prefix of an installation."""
    version: str
    origin: str
    """Identifies its bytes."""


def find(abi: Abi, cache: Path) -> Sdk:
    """The SDK for an ABI; downloaded once into `cache` where the installed wheel is for another ABI."""
    if abi == "arm64-v8a":
        return _for_android()
    version, installed = _installed_wheel()
    if MACHINES.get(family(platform.machine())) == abi and platform.system() == "Linux":
        return Sdk(installed, version, "installed")
    cached = sorted(cache.glob(f"executorch-{version}-{abi}-*"))
    folder = cached[0] if cached else _fetch(abi, version, cache)
    return Sdk(folder / "executorch", version, folder.name)


def _for_android() -> Sdk:
    """The installation that the user built; ExecuTorch's wheels have none for Android."""
    if not (given := os.environ.get(ANDROID)):
        raise UnavailableError(f"arm64-v8a: {ANDROID} names no ExecuTorch built with Android's NDK: see docs/runner.md")
    root = Path(given).expanduser().resolve()
    if missing := next((header for header in (_VERSION, _ALLOCATOR) if not (root / header).is_file()), None):
        raise ExportError(f"{ANDROID}={given}: no {missing} there; docs/runner.md says which ExecuTorch it takes")
    version = re.search(r'ET_VERSION "(.+)"', (root / _VERSION).read_text(encoding="utf-8"))
    libraries = sorted(root.glob("lib/**/*.a"))
    return Sdk(root, version[1] if version else "unknown", " ".join(map(sha256, libraries)))


def _installed_wheel() -> tuple[str, Path]:
    """Version and folder of the environment's executorch, which is not imported because that loads torch."""
    try:
        wheel = distribution("executorch")
    except PackageNotFoundError:
        raise ExportError(
            "executorch is not installed: the runner is built from its libraries; run make setup"
        ) from None
    return wheel.version, Path(str(wheel.locate_file("executorch"))).resolve()


def _fetch(abi: Abi, version: str, cache: Path) -> Path:
    """Download the wheel of that version and unpack what a build needs; whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as scratch:
        platforms = [f"manylinux_2_{glibc}_{abi.replace('-', '_')}" for glibc in (28, 27)]
        try:
            (wheel,) = download([f"executorch=={version}"], _PYTHON, platforms, Path(scratch))
        except UnavailableError as error:
            raise UnavailableError(f"executorch {version} for {abi}: {error}") from None
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(_PARTS)])
        return settle(unpacked, cache / f"executorch-{version}-{abi}-{sha256(wheel)[:12]}")


def download(packages: Sequence[str], python: str, platforms: Sequence[str], into: Path) -> list[Path]:
    """The wheels of `name==version` for that Python and the first platform that has one.

    Raises UnavailableError: there are none; ExportError: they are not those that the lock holds.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    command += ["--abi", f"cp{python.replace('.', '')}", *(f"--platform={platform}" for platform in platforms)]
    pinned = into / "requirements.txt"
    pinned.write_text("\n".join(map(locked, packages)), encoding="utf-8")
    command += ["--require-hashes", "--requirement", str(pinned), "--dest", str(into)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    refuse_changed(done.stderr)
    if done.returncode or len(wheels) != len(packages):
        raise UnavailableError(f"pip download failed: {last_line(done.stderr)}")
    return wheels


def refuse_changed(pip_said: str) -> None:
    """Raise ExportError where pip compared a download with the lock and stopped."""
    if _CHANGED in pip_said:
        names = ", ".join(re.findall(r"^ +(\S+==\S+) from ", pip_said, re.MULTILINE)) or "a package"
        raise ExportError(
            f"{names}: the index has another file than the ones whose sha256 are in locks/{LOCK.name}; nothing of it "
            "was installed: use an index that you trust (`pip config list` shows yours)"
        )


def locked(package: str) -> str:
    """The lines of locks/release.txt for `name==version`, with its hashes. Raises UnavailableError: another version."""
    hashes = r"(?: \\\n    --hash=sha256:[0-9a-f]{64})+"
    if found := re.search(f"^{re.escape(package)}{hashes}", LOCK.read_text(encoding="utf-8"), re.MULTILINE):
        return found[0]
    raise UnavailableError(f"{LOCK}: no hashes of {package}; run `make setup`")


def with_dependencies(*names: str) -> list[str]:
    """`name==version` of installed packages and all that they need, names as the lock spells them."""
    found, waiting = dict[str, str](), list(names)
    while waiting:
        if (name := canonicalize_name(waiting.pop())) not in found:
            installed = distribution(name)
            found[name] = f"{name}=={installed.version}"
            needed = map(Requirement, installed.requires or ())
            waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return sorted(found.values())


def settle(finished: Path, place: Path) -> Path:
    """Rename a finished folder into its place; if another process was faster, its folder is equal."""
    try:
        finished.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(finished)
    return place
