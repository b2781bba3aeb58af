"""Builds the C++ runner as a folder that can be copied to a device.

python -m runtime_tests.device_runner.build [x86-64|aarch64]
"""

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import typer

from devices.transports import packages
from devices.transports.transfer import family
from export.build.command import run
from export.errors import ExportError
from export.host import processor
from export.host.console import say
from export.manifest import ROOT

from . import sdk
from .sdk import ABIS, MACHINES, Abi, UnavailableError

SOURCES = Path(__file__).parent / "cpp"
BUILD = ROOT / "build" / "runner"
_LIBRARIES = ("", "_threadpool", "_kernels_optimized", "_kernels_quantized", "_backend_xnnpack")
_CROSS_COMPILER = "aarch64-linux-gnu-g++"
_DYNAMIC_LOADER = "ld-linux-aarch64.so.1"
_LOADER_PLACES = (Path("/lib"), Path("/lib64"))
"""Programs name it by the first, whatever folders a compiler searches."""
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


@dataclass(frozen=True)
class _Compiler:
    """The compiler for an ABI on this machine."""

    command: str
    options: tuple[str, ...]
    """For cmake."""


def build(abi: Abi, *, folder: Path = BUILD) -> _Bundle:
    """The bundle for an ABI; compiled only if sources, SDK or compiler have changed since."""
    compiler = compiler_for(abi)
    kit = sdk.find(abi, folder / "sdk")
    place = folder / f"{abi}-{digest(kit, compiler)}"
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
            sdk.settle(_assemble(abi, kit, compiler, Path(scratch)), place)
    return _Bundle(place, abi)


def kernels_library(into: Path) -> Path:
    """The attention and cache kernels as a shared library for this machine, for tests."""
    abi = host_abi()
    _compile("kernels", sdk.find(abi, BUILD / "sdk"), compiler_for(abi), into)
    return into / "libkernels.so"


def _assemble(abi: Abi, kit: sdk.Sdk, compiler: _Compiler, scratch: Path) -> Path:
    """Compile, then put program and libraries together."""
    _compile("runner", kit, compiler, scratch / "objects")
    bundle = scratch / "bundle"
    for name in ("bin", "lib"):
        (bundle / name).mkdir(parents=True)
    shutil.copy(scratch / "objects" / "runner", bundle / "bin")
    for library in _LIBRARIES:
        shutil.copy(kit.root / "lib" / f"libexecutorch{library}.so", bundle / "lib")
    if abi == "aarch64":
        # not in lib/, where the program itself searches: a device's own loader would crash with our C library
        (bundle / "loader").mkdir()
        for path in _system_libraries(compiler):
            shutil.copy(path, bundle / "loader")
    return bundle


def _compile(target: str, kit: sdk.Sdk, compiler: _Compiler, into: Path) -> None:
    """Configure and build with cmake; the first error line is the reason when it fails."""
    for command in (
        ("cmake", "-S", str(SOURCES), "-B", str(into), f"-DCMAKE_PREFIX_PATH={kit.root}", *compiler.options),
        ("cmake", "--build", str(into), "--target", target, "--parallel", str(processor.usable())),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
            raise ExportError(f"{target}: cmake failed: {(lines or ['see its output'])[0].strip()}")


def compiler_for(abi: Abi) -> _Compiler:
    """The compiler for an ABI; UnavailableError names the package that is missing."""
    native = platform.system() == "Linux" and host_abi() == abi
    if not native and abi != "aarch64":
        raise UnavailableError(f"{abi}: the runner is compiled for it only on such a machine")
    name = "g++" if native else _CROSS_COMPILER
    for tool in ("cmake", "make", name):
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool}: not found, needed to build the runner for {abi}; {packages.hint(tool)}")
    toolchain = () if native else (f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / 'aarch64.cmake'}",)
    return _Compiler(name, (f"-DCMAKE_CXX_COMPILER={name}", "-GUnix Makefiles", *toolchain))


def host_abi() -> Abi:
    """The ABI of this machine."""
    if (found := MACHINES.get(family(platform.machine()))) is None:
        raise UnavailableError(f"{platform.machine()}: there is no runner for this processor")
    return found


def _system_libraries(compiler: _Compiler) -> list[Path]:
    """The compiler's own C and C++ libraries, with the loader that belongs to them."""
    native = compiler.command != _CROSS_COMPILER
    paths = []
    for name in _SYSTEM:
        path = Path(_answer(compiler, f"-print-file-name={name}"))
        if not path.is_absolute():  # it prints the bare name of what it does not find: on Fedora the loader, elsewhere
            places = _LOADER_PLACES if native and name == _DYNAMIC_LOADER else ()
            path = next((place / name for place in places if (place / name).is_file()), path)
        if not path.is_absolute():
            remedy = packages.hint(compiler.command) if native else "install libc6-dev-arm64-cross"
            raise UnavailableError(f"{name}: not found beside {compiler.command}; {remedy}")
        paths.append(path)
    return paths


def digest(kit: sdk.Sdk, compiler: _Compiler) -> str:
    """A hash of everything that decides the bundle: sources, SDK and compiler."""
    total = hashlib.sha256(f"{kit.version} {kit.origin} {_answer(compiler, '--version')}".encode())
    for path in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        total.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]


def _answer(compiler: _Compiler, option: str) -> str:
    return subprocess.run([compiler.command, option], capture_output=True, text=True, check=True).stdout.strip()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(abi: str = typer.Argument(None, help=" | ".join(ABIS))) -> None:
    """Build the runner for ABI (default: this machine's own) and print its folder."""
    chosen = next((known for known in ABIS if known == (abi or host_abi())), None)
    if chosen is None:
        raise ExportError(f"unknown ABI {abi!r}; known: {', '.join(ABIS)}")
    say(str(build(chosen).path))


if __name__ == "__main__":
    sys.exit(run(app))
