"""Builds the C++ runner as a folder that can be copied to a device. Knows nothing about devices or models.

python -m runtime_tests.runner.build [x86-64|aarch64]
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import typer

from export.cli import run
from export.errors import ExportError
from export.manifest import ROOT

from . import sdk
from .sdk import ABIS, MACHINES, Abi, UnavailableError

SOURCES = Path(__file__).parent
BUILD = ROOT / "build" / "runner"
LIBRARIES = ("", "_threadpool", "_kernels_optimized", "_kernels_quantized", "_backend_xnnpack")
CROSS_COMPILER = "aarch64-linux-gnu-g++"
PACKAGES = {"cmake": "cmake", "make": "make", "g++": "g++", CROSS_COMPILER: "g++-aarch64-linux-gnu"}
DYNAMIC_LOADER = "ld-linux-aarch64.so.1"
# all that the runner and the SDK's libraries ask of a system
SYSTEM = (DYNAMIC_LOADER, "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "libstdc++.so.6", "libgcc_s.so.1")


@dataclass(frozen=True)
class Bundle:
    """A folder to copy to a device as it is."""

    path: Path
    abi: Abi
    files: tuple[str, ...]
    """Every file, relative to `path`."""
    start: tuple[str, ...]
    """The command, relative to `path`."""
    start_alone: tuple[str, ...] | None
    """The same with a C library of its own, for systems with an older one or another (Android)."""


@dataclass(frozen=True)
class Compiler:
    """What compiles for an ABI on this machine."""

    command: str
    options: tuple[str, ...]
    """For cmake."""


def build(abi: Abi, *, folder: Path = BUILD) -> Bundle:
    """The bundle for an ABI; compiled only if sources, SDK or compiler have changed since."""
    compiler = compiler_for(abi)
    kit = sdk.find(abi, folder / "sdk")
    place = folder / f"{abi}-{digest(kit, compiler)}"
    if not place.is_dir():
        with tempfile.TemporaryDirectory(dir=folder_made(folder), prefix=".part-") as scratch:
            sdk.settle(assemble(abi, kit, compiler, Path(scratch)), place)
    return described(place, abi)


def kernels_library(into: Path) -> Path:
    """The attention and cache kernels as a shared library for this machine, for tests."""
    abi = host_abi()
    compile_target("kernels", sdk.find(abi, BUILD / "sdk"), compiler_for(abi), into)
    return into / "libkernels.so"


def described(place: Path, abi: Abi) -> Bundle:
    """What a finished folder holds."""
    files = tuple(sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()))
    alone = (f"loader/{DYNAMIC_LOADER}", "--library-path", "loader:lib", "bin/runner")
    return Bundle(place, abi, files, ("bin/runner",), alone if alone[0] in files else None)


def assemble(abi: Abi, kit: sdk.Sdk, compiler: Compiler, scratch: Path) -> Path:
    """Compile, then put program and libraries together."""
    compile_target("runner", kit, compiler, scratch / "objects")
    bundle = scratch / "bundle"
    for name in ("bin", "lib"):
        (bundle / name).mkdir(parents=True)
    shutil.copy(scratch / "objects" / "runner", bundle / "bin")
    for library in LIBRARIES:
        shutil.copy(kit.root / "lib" / f"libexecutorch{library}.so", bundle / "lib")
    if abi == "aarch64":
        # not in lib/, where the program itself looks: a device's own loader with our C library would crash
        (bundle / "loader").mkdir()
        for path in system_libraries(compiler):
            shutil.copy(path, bundle / "loader")
    return bundle


def compile_target(target: str, kit: sdk.Sdk, compiler: Compiler, into: Path) -> None:
    """cmake, configure and build; the last error line speaks when it fails."""
    for command in (
        ("cmake", "-S", str(SOURCES), "-B", str(into), f"-DCMAKE_PREFIX_PATH={kit.root}", *compiler.options),
        ("cmake", "--build", str(into), "--target", target, "--parallel", str(os.cpu_count() or 1)),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
            raise ExportError(f"{target}: cmake failed: {(lines or ['see its output'])[0].strip()}")


def compiler_for(abi: Abi) -> Compiler:
    """The compiler, or one line that names the missing package."""
    native = platform.system() == "Linux" and host_abi() == abi
    if not native and abi != "aarch64":
        raise UnavailableError(f"{abi}: the runner is compiled for it only on such a machine")
    name = "g++" if native else CROSS_COMPILER
    for tool in ("cmake", "make", name):
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool}: not found, needed to build the runner for {abi}; install {PACKAGES[tool]}")
    toolchain = () if native else (f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / 'aarch64.cmake'}",)
    return Compiler(name, (f"-DCMAKE_CXX_COMPILER={name}", "-GUnix Makefiles", *toolchain))


def host_abi() -> Abi:
    """What this machine runs."""
    if platform.machine() not in MACHINES:
        raise UnavailableError(f"{platform.machine()}: there is no runner for this processor")
    return MACHINES[platform.machine()]


def system_libraries(compiler: Compiler) -> list[Path]:
    """The compiler's own C and C++ libraries, with the loader that belongs to them."""
    paths = [Path(asked(compiler, f"-print-file-name={name}")) for name in SYSTEM]
    for path in paths:
        if not path.is_absolute():  # it prints the bare name of what it does not have
            raise UnavailableError(f"{path}: not found beside {compiler.command}; install libc6-dev-arm64-cross")
    return paths


def digest(kit: sdk.Sdk, compiler: Compiler) -> str:
    """Changes when the bundle would."""
    found = hashlib.sha256(f"{kit.version} {kit.origin} {asked(compiler, '--version')}".encode())
    for path in sorted(
        [*SOURCES.rglob("*.h"), *SOURCES.rglob("*.cpp"), *SOURCES.rglob("*cmake*"), *SOURCES.glob("*.txt")]
    ):
        found.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def asked(compiler: Compiler, question: str) -> str:
    """What the compiler says."""
    return subprocess.run([compiler.command, question], capture_output=True, text=True, check=True).stdout.strip()


def folder_made(folder: Path) -> Path:
    """The folder, there now."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(abi: str = typer.Argument(None, help=" | ".join(ABIS))) -> None:
    """Build the runner for ABI (default: this machine's own) and print its folder."""
    chosen = next((known for known in ABIS if known == (abi or host_abi())), None)
    if chosen is None:
        raise ExportError(f"unknown ABI {abi!r}; known: {', '.join(ABIS)}")
    print(build(chosen).path)


if __name__ == "__main__":
    sys.exit(run(app))
