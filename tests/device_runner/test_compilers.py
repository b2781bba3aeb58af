"""Which compiler builds the C++ runner, and where one that has no C library to bring along gets it."""

import hashlib
import io
import tarfile

import pytest

from export.errors import ExportError
from runtime_tests.device_runner import c_library, compilers, sdk

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
