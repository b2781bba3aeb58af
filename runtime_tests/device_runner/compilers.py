"""The compilers that can build the C++ runner: GNU's, Android's, and zig's, which runs on any desk for any Linux."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devices.transports import packages
from devices.transports.transfer import family
from export.errors import ExportError

from . import c_library
from .sdk import MACHINES, Abi, UnavailableError

ZIG, GNU = "zig", "g++"
NAMES = (ZIG, GNU)
CHOICE = "LLAMA_COMPILER"
"""The environment's variable that chooses one of them."""
_GLIBC = "2.28"
"""That of ExecuTorch's wheels, so of the oldest system that the runner can start on."""
_TARGETS: dict[Abi, str] = {"x86-64": f"x86_64-linux-gnu.{_GLIBC}", "aarch64": f"aarch64-linux-gnu.{_GLIBC}"}
_CROSS_COMPILER = "aarch64-linux-gnu-g++"
_LOADER_PLACES = (Path("/lib"), Path("/lib64"))
"""Programs name the loader by the first, whatever folders a compiler searches."""
_TOOLCHAIN = Path(__file__).parent / "cpp/aarch64.cmake"
_NDK, _NDK_NAMES = "ANDROID_NDK", ("ANDROID_NDK", "ANDROID_NDK_HOME", "ANDROID_NDK_ROOT")
_NDK_PLACES = ("~/Library/Android/sdk/ndk", "~/Android/Sdk/ndk")
"""Where Android Studio puts its versions."""
_OLDEST_ANDROID = 26
"""ExecuTorch's own builds begin there."""


@dataclass(frozen=True)
class Compiler:
    """One that is here, for one ABI."""

    command: tuple[str, ...]
    options: tuple[str, ...]
    """For cmake."""

    @property
    def identity(self) -> str:
        """What decides its output."""
        brought = f" zig {_GLIBC} {c_library.IDENTITY}" if self._is_zig else ""
        return self._answer("--version") + brought

    @property
    def _is_zig(self) -> bool:
        return len(self.command) > 1

    def system_libraries(self, names: Sequence[str], cache: Path) -> list[Path]:
        """The files of a C and C++ library for arm64, with the loader that belongs to them: Debian's, or its own."""
        if self._is_zig:  # it has stubs alone
            return c_library.find(names, cache)
        return [self._system_library(name) for name in names]

    def _system_library(self, name: str) -> Path:
        command = self.command[0]
        path = Path(self._answer(f"-print-file-name={name}"))
        if path.is_absolute():
            return path
        # it prints the bare name of what it does not find: on Fedora the loader, elsewhere what is not installed
        places = _LOADER_PLACES if command == GNU and name.startswith("ld-") else ()
        for place in places:
            if (place / name).is_file():
                return place / name
        remedy = packages.hint(command) if command == GNU else "install libc6-dev-arm64-cross"
        raise UnavailableError(f"{name}: not found beside {command}; {remedy}")

    def _answer(self, option: str) -> str:
        return subprocess.run([*self.command, option], capture_output=True, text=True, check=True).stdout.strip()


def find(abi: Abi, name: str | None = None) -> Compiler:
    """The compiler of that name, else the chosen one, else: g++ for this machine itself, zig before GNU's for others.

    Raises UnavailableError with the remedy of this system; ExportError: there is no compiler of that name.
    """
    native = platform.system() == "Linux" and host_abi() == abi
    if not native and abi == "x86-64":
        raise UnavailableError(f"{abi}: the runner is compiled for it only on such a machine")
    for tool in ("cmake", "make"):
        if shutil.which(tool) is None:
            raise _missing(tool, abi)
    if abi == "arm64-v8a":
        return _ndk()
    gnu = "g++" if native else _CROSS_COMPILER
    cross = () if native else (f"-DCMAKE_TOOLCHAIN_FILE={_TOOLCHAIN}",)
    order = [_chosen(name)] if name or os.environ.get(CHOICE) else [GNU, ZIG] if native else [ZIG, GNU]
    for one in order:
        if one == ZIG and (zig := _zig()):
            target = f"-DCMAKE_CXX_COMPILER_TARGET={_TARGETS[abi]}"
            return Compiler((zig, "c++"), (f"-DCMAKE_CXX_COMPILER={zig};c++", target, *cross))
        if one == GNU and shutil.which(gnu):
            return Compiler((gnu,), (f"-DCMAKE_CXX_COMPILER={gnu}", *cross))
    wanted = order[0] if len(order) == 1 else ZIG if platform.system() == "Darwin" else GNU
    raise _missing(gnu if wanted == GNU else ZIG, abi)


def host_abi() -> Abi:
    """The ABI of this machine."""
    if (found := MACHINES.get(family(platform.machine()))) is None:
        raise UnavailableError(f"{platform.machine()}: there is no runner for this processor")
    return found


def _chosen(name: str | None) -> str:
    if (chosen := name or os.environ[CHOICE]) not in NAMES:
        raise ExportError(f"{CHOICE}={chosen}: the runner's compilers are {' and '.join(NAMES)}")
    return chosen


def _zig() -> str | None:
    """The program on the PATH, else that of the Python package `ziglang`."""
    if found := shutil.which("zig"):
        return found
    package = importlib.util.find_spec("ziglang")
    return str(Path(package.origin).with_name("zig")) if package and package.origin else None


def _ndk() -> Compiler:
    """The clang of Android's NDK: of the folder that the environment names, else of Android Studio's newest."""
    named = [Path(os.environ[name]) for name in _NDK_NAMES if os.environ.get(name)]
    kept = [path for place in _NDK_PLACES for path in Path(place).expanduser().glob("*")]
    kept.sort(key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)], reverse=True)
    for place in named or kept:
        toolchain = place / "build/cmake/android.toolchain.cmake"
        for clang in place.glob("toolchains/llvm/prebuilt/*/bin/clang++"):
            options = (f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DANDROID_ABI=arm64-v8a", "-DANDROID_STL=c++_static")
            return Compiler((str(clang),), (*options, f"-DANDROID_PLATFORM=android-{_OLDEST_ANDROID}"))
    where = f"no clang++ in {named[0]}" if named else "not found"
    raise UnavailableError(f"Android NDK: {where}, needed to build the runner for arm64-v8a; {_NDK} names its folder")


def _missing(tool: str, abi: Abi) -> UnavailableError:
    return UnavailableError(f"{tool}: not found, needed to build the runner for {abi}; {packages.hint(tool)}")
