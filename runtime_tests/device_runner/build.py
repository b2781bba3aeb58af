"""Builds the C++ runner as a folder that can be copied to a device.

python -m runtime_tests.device_runner.build [x86-64|aarch64|arm64-v8a]     LLAMA_COMPILER=zig|g++ chooses the compiler
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import typer

from export.build.command import run
from export.errors import ExportError
from export.host import processor
from export.host.console import say
from export.manifest import ROOT

from . import compilers, sdk
from .compilers import Compiler
from .sdk import ABIS, Abi

SOURCES = Path(__file__).parent / "cpp"
BUILD = ROOT / "build" / "runner"
_LIBRARIES = ("", "_threadpool", "_kernels_optimized", "_kernels_quantized", "_backend_xnnpack")
_DYNAMIC_LOADER = "ld-linux-aarch64.so.1"
# all system libraries that the runner and the SDK's libraries need
_SYSTEM = (
    _DYNAMIC_LOADER,
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "libstdc++.so.6",
    "libgcc_s.so.1",
)


@dataclass(frozen=True)
class _Bundle:
    """A folder to copy to a device as it is; commands are relative to it."""

    path: Path
    abi: Abi
    start: ClassVar[tuple[str, ...]] = ("bin/runner",)

    @property
    def start_alone(self) -> tuple[str, ...] | None:
        """The same with a C library of its own, for systems with an older or a different one (Android)."""
        loader = f"loader/{_DYNAMIC_LOADER}"
        command = (loader, "--library-path", "loader:lib", *self.start)
        return command if (self.path / loader).is_file() else None


def build(abi: Abi, *, compiler: str | None = None, folder: Path = BUILD) -> _Bundle:
    """The bundle for an ABI; compiled only if sources, SDK or compiler have changed since."""
    chosen = compilers.find(abi, compiler)
    kit = sdk.find(abi, folder / "sdk")
    place = folder / f"{abi}-{digest(kit, chosen)}"
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
            sdk.settle(_assemble(abi, kit, chosen, Path(scratch), folder / "sdk"), place)
    return _Bundle(place, abi)


def kernels_library(into: Path, compiler: str | None = None) -> Path:
    """The attention and cache kernels as a shared library for this machine, for tests."""
    abi = compilers.host_abi()
    _compile("kernels", sdk.find(abi, BUILD / "sdk"), compilers.find(abi, compiler), into)
    return into / "libkernels.so"


def _assemble(abi: Abi, kit: sdk.Sdk, compiler: Compiler, scratch: Path, downloads: Path) -> Path:
    """Compile, then put program and libraries together."""
    _compile("runner", kit, compiler, scratch / "objects")
    bundle = scratch / "bundle"
    for name in ("bin", "lib"):
        (bundle / name).mkdir(parents=True)
    shutil.copy(scratch / "objects" / "runner", bundle / "bin")
    for library in _LIBRARIES if abi != "arm64-v8a" else ():  # there all of them are in the program
        shutil.copy(kit.root / "lib" / f"libexecutorch{library}.so", bundle / "lib")
    if abi == "aarch64":
        # not in lib/, where the program itself searches: a device's own loader would crash with our C library
        (bundle / "loader").mkdir()
        for path in compiler.system_libraries(_SYSTEM, downloads):
            shutil.copy(path, bundle / "loader")
    return bundle


def _compile(target: str, kit: sdk.Sdk, compiler: Compiler, into: Path) -> None:
    """Configure and build with cmake; the first error line is the reason when it fails."""
    for command in (
        (
            "cmake",
            "-S",
            str(SOURCES),
            "-B",
            str(into),
            f"-DCMAKE_PREFIX_PATH={kit.root}",
            f"-DEXECUTORCH_VERSION={kit.version.partition('+')[0]}",
            "-GUnix Makefiles",
            *compiler.options,
        ),
        ("cmake", "--build", str(into), "--target", target, "--parallel", str(processor.usable())),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
            raise ExportError(f"{target}: cmake failed: {(lines or ['see its output'])[0].strip()}")


def digest(kit: sdk.Sdk, compiler: Compiler) -> str:
    """A hash of everything that decides the bundle: sources, SDK and compiler."""
    total = hashlib.sha256(f"{kit.version} {kit.origin} {compiler.identity}".encode())
    for path in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        total.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(abi: str = typer.Argument(None, help=" | ".join(ABIS))) -> None:
    """Build the runner for ABI (default: this machine's own) and print its folder."""
    chosen = next((known for known in ABIS if known == (abi or compilers.host_abi())), None)
    if chosen is None:
        raise ExportError(f"unknown ABI {abi!r}; known: {', '.join(ABIS)}")
    say(str(build(chosen).path))


if __name__ == "__main__":
    sys.exit(run(app))
