"""Which compiler builds the C++ runner, and where one that has no C library to bring along gets it."""

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from export.errors import ExportError
from runtime_tests.device_runner import build, c_library, compilers, sdk

TOOLS = ("cmake", "make")
CROSS = "aarch64-linux-gnu-g++"


@pytest.fixture
def desk(monkeypatch, tmp_path):
    """A machine of that system with these programs; `ziglang` is the Python package."""

    def stand(*programs, system="Linux", chosen="", ziglang=False):
        for program in programs:
            (tmp_path / program).symlink_to("/bin/true")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv(compilers.CHOICE, chosen)
        monkeypatch.setattr(compilers.platform, "system", lambda: system)
        monkeypatch.setattr(compilers.platform, "machine", lambda: "arm64" if system == "Darwin" else "x86_64")
        monkeypatch.setattr(
            compilers.packages.hint, "__defaults__", ({"Darwin": "darwin"}.get(system, "linux"), "ID=debian")
        )
        package = compilers.importlib.util.spec_from_file_location("ziglang", tmp_path / "zig/__init__.py")
        monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: package if ziglang else None)
        return tmp_path

    return stand


@pytest.mark.parametrize(
    ("abi", "programs", "chosen", "taken"),
    [
        ("x86-64", ("g++", "zig", CROSS), "", "g++"),
        ("x86-64", ("zig", CROSS), "", "zig"),
        ("aarch64", ("g++", "zig", CROSS), "", "zig"),
        ("aarch64", ("g++", CROSS), "", CROSS),
        ("x86-64", ("g++", "zig"), "zig", "zig"),
        ("aarch64", ("zig", CROSS), "g++", CROSS),
    ],
)
def test_the_compiler_that_is_taken(desk, abi, programs, chosen, taken):
    there = desk(*TOOLS, *programs, chosen=chosen)
    command = (str(there / "zig"), "c++") if taken == "zig" else (taken,)
    found = compilers.find(abi)
    assert found.command == command
    assert f"-DCMAKE_CXX_COMPILER={';'.join(command)}" in found.options
    assert any("aarch64.cmake" in option for option in found.options) == (abi == "aarch64")


def test_zig_out_of_a_python_package_builds_for_boards_on_a_mac(desk):
    there = desk(*TOOLS, system="Darwin", ziglang=True)
    found = compilers.find("aarch64")
    assert found.command == (str(there / "zig/zig"), "c++")
    assert "-DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu.2.28" in found.options


@pytest.mark.parametrize(
    ("abi", "system", "programs", "chosen", "line"),
    [
        ("aarch64", "Linux", TOOLS, "", f"{CROSS}: not found, .* for aarch64; apt install g++-aarch64-linux-gnu"),
        ("x86-64", "Linux", TOOLS, "", "g++: not found, .* for x86-64; apt install g++"),
        ("aarch64", "Darwin", TOOLS, "", "zig: not found, .* for aarch64; .venv/bin/pip install ziglang"),
        ("aarch64", "Darwin", TOOLS[1:], "", "cmake: not found, .* for aarch64; brew install cmake"),
        ("aarch64", "Linux", (*TOOLS, CROSS), "zig", "zig: not found, .* for aarch64; .venv/bin/pip install ziglang"),
        ("x86-64", "Linux", (*TOOLS, "zig"), "g++", "g++: not found, .* for x86-64; apt install g++"),
    ],
)
def test_where_there_is_none_one_line_has_the_remedy_of_the_system(desk, abi, system, programs, chosen, line):
    desk(*programs, system=system, chosen=chosen)
    with pytest.raises(sdk.UnavailableError, match=f"^{line.replace('+', '[+]')}$"):
        compilers.find(abi)


def test_a_choice_that_is_none_is_told(desk):
    desk(*TOOLS, "g++", chosen="clang")
    with pytest.raises(ExportError, match=r"^LLAMA_COMPILER=clang: the runner's compilers are zig and g\+\+$"):
        compilers.find("x86-64")


ARCHIVES = (
    "executorch",
    "extension_threadpool",
    "optimized_native_cpu_ops_lib",
    "quantized_ops_lib",
    "xnnpack_backend",
)


@pytest.fixture
def android(monkeypatch, tmp_path):
    """An ExecuTorch as its own build installs it, with archives, and the file that an NDK's clang would be."""
    prefix = tmp_path / "my executorch"
    for header in (sdk._VERSION, sdk._ALLOCATOR):
        (prefix / header).parent.mkdir(parents=True)
        (prefix / header).write_text('#define ET_VERSION "1.5.0"\n')
    config = prefix / "lib/cmake/ExecuTorch/executorch-config.cmake"
    config.parent.mkdir(parents=True)
    for name in ARCHIVES:
        with config.open("a") as file:
            file.write(f"add_library({name} STATIC IMPORTED)\n")
            file.write(f'set_target_properties({name} PROPERTIES IMPORTED_LOCATION "{prefix}/lib/lib{name}.a")\n')
        (prefix / f"lib/lib{name}.a").touch()
    monkeypatch.setenv(sdk.ANDROID, str(prefix))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in compilers._NDK_NAMES:
        monkeypatch.delenv(name, raising=False)

    def ndk(at):
        """A folder of an NDK, whose toolchain is this machine's own."""
        clang = Path(at, "toolchains/llvm/prebuilt/linux-x86_64/bin/clang++")
        clang.parent.mkdir(parents=True)
        clang.touch()
        toolchain = Path(at, "build/cmake/android.toolchain.cmake")
        toolchain.parent.mkdir(parents=True)
        toolchain.write_text("set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)\n")
        return clang

    ndk.prefix = prefix
    return ndk


def test_the_newest_ndk_of_android_studio_is_taken_but_one_that_is_named_first(desk, android, tmp_path, monkeypatch):
    desk(*TOOLS, "zig", CROSS, chosen="zig")
    android(tmp_path / "Library/Android/sdk/ndk/9.1.0")
    newest = android(tmp_path / "Library/Android/sdk/ndk/27.0.12077973")
    found = compilers.find("arm64-v8a")
    assert found.command == (str(newest),)
    assert f"-DCMAKE_TOOLCHAIN_FILE={newest.parents[5]}/build/cmake/android.toolchain.cmake" in found.options
    monkeypatch.setenv("ANDROID_NDK_HOME", str(tmp_path / "ndk"))
    line = (
        f"Android NDK: no clang[+][+] in {tmp_path}/ndk, needed to build .* for arm64-v8a; ANDROID_NDK names its folder"
    )
    with pytest.raises(sdk.UnavailableError, match=f"^{line}$"):
        compilers.find("arm64-v8a")
    clang = android(tmp_path / "ndk")
    assert compilers.find("arm64-v8a").command == (str(clang),)


def test_without_an_ndk_or_an_executorch_for_android_a_line_says_which_is_missing(desk, android, monkeypatch):
    desk(*TOOLS)
    with pytest.raises(sdk.UnavailableError, match=r"^Android NDK: not found, .*; ANDROID_NDK names its folder$"):
        compilers.find("arm64-v8a")
    for header in (sdk._ALLOCATOR, sdk._VERSION):
        (android.prefix / header).unlink()
        line = f"^LLAMA_EXECUTORCH={android.prefix}: no {header} there; docs/runner.md says which ExecuTorch it takes$"
        with pytest.raises(ExportError, match=line):
            sdk.find("arm64-v8a", android.prefix)
    monkeypatch.delenv(sdk.ANDROID)
    with pytest.raises(sdk.UnavailableError, match=r"^arm64-v8a: LLAMA_EXECUTORCH names no ExecuTorch .*runner.md$"):
        sdk.find("arm64-v8a", android.prefix)


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("g++"), reason="cmake or g++: not found")
def test_an_executorch_built_from_source_is_linked_into_the_runner(android, tmp_path, monkeypatch):
    """Configured, not compiled: the NDK is a stand-in that finds packages in its own root alone."""
    android(tmp_path / "ndk")
    monkeypatch.setenv("ANDROID_NDK", str(tmp_path / "ndk"))
    kit = sdk.find("arm64-v8a", tmp_path)
    assert (kit.version, kit.root) == ("1.5.0", android.prefix)
    assert kit.origin != sdk.Sdk(kit.root, kit.version, "").origin
    into = tmp_path / "objects"
    words = ["cmake", "-S", build.SOURCES, "-B", into, f"-DCMAKE_PREFIX_PATH={kit.root}"]
    words += ["-GUnix Makefiles", *compilers.find("arm64-v8a").options]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    linked = (into / "CMakeFiles/runner.dir/link.txt").read_text()
    assert all(f"{kit.root}/lib/lib{name}.a" in linked for name in ARCHIVES)


def package(files, links):
    """A Debian package: an ar archive with one of odd length before the one that matters."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    entries = {"debian-binary": b"2.0", "data.tar.xz": packed.getvalue()}
    parts = (
        f"{n:<16}{0:<12}{0:<6}{0:<6}{0:<8}{len(e):<10}`\n".encode() + e + b"\n" * (len(e) % 2)
        for n, e in entries.items()
    )
    return b"!<arch>\n" + b"".join(parts)


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A mirror with one package, whose sha256 is the known one."""
    content = package(
        {"./lib/arch/libc.so.6": b"C", "./usr/lib/arch/libstdc++.so.6.0.30": b"C++", "./usr/share/doc/x": b""},
        {"./usr/lib/arch/libstdc++.so.6": "libstdc++.so.6.0.30", "./usr/lib/elsewhere": "../../etc/passwd"},
    )
    file = tmp_path / "mirror/pool/main/g/glibc/libc6_arm64.deb"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    monkeypatch.setenv("DEBIAN_MIRROR", (tmp_path / "mirror").as_uri())
    monkeypatch.setattr(c_library, "_PACKAGES", {"glibc/libc6_arm64.deb": hashlib.sha256(content).hexdigest()})
    return file


def test_the_c_library_comes_out_of_debians_packages_once(mirror, tmp_path):
    names, cache = ("libc.so.6", "libstdc++.so.6"), tmp_path / "cache"
    found = c_library.find(names, cache)
    assert [path.read_bytes() for path in found] == [b"C", b"C++"]
    assert {path.name for path in found[0].parent.iterdir()} == set(names)
    mirror.unlink()
    assert c_library.find(names, cache) == found


def test_a_package_that_is_another_or_missing_is_one_line_and_leaves_nothing(mirror, tmp_path):
    mirror.write_bytes(mirror.read_bytes() + b"\n")
    with pytest.raises(ExportError, match=r"libc6_arm64.deb: its sha256 is not [0-9a-f]{64}, nothing of it was kept"):
        c_library.find(("libc.so.6",), tmp_path / "cache")
    mirror.unlink()
    with pytest.raises(sdk.UnavailableError, match=r"libc6_arm64.deb: .*; DEBIAN_MIRROR=http://…/debian names another"):
        c_library.find(("libc.so.6",), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
