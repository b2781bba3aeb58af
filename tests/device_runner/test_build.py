"""How the C++ runner is built: once, whole or not at all, and with no libraries but its own."""

import re
import shutil
import subprocess
import zipfile
from functools import partial

import pytest

import devices
from export.errors import ExportError
from export.host import digests
from runtime_tests.device_runner import build, compilers, mlpackage, sdk


def test_a_bundle_is_built_once(bundle, compiler, monkeypatch):
    monkeypatch.setattr(build, "_compile", None)
    assert build.build(bundle.abi, compiler=compiler) == bundle


def test_a_change_of_sources_is_another_bundle(bundle, compiler, monkeypatch, tmp_path):
    shutil.copytree(build.SOURCES, tmp_path / "sources")
    kit, found = sdk.find(bundle.abi, build.BUILD / "sdk"), compilers.find(bundle.abi, compiler)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    assert bundle.path.name == f"{bundle.abi}-{build.digest(kit, found)}"
    with (tmp_path / "sources/kernels/attention.h").open("a") as file:
        file.write("\n")
    assert bundle.path.name != f"{bundle.abi}-{build.digest(kit, found)}"


def test_a_failed_build_leaves_nothing(bundle, compiler, monkeypatch, tmp_path):
    shutil.copytree(build.SOURCES, tmp_path / "sources")
    (tmp_path / "sources/kernels/attention_tile.cpp").write_text("syntax error\n")  # of the first
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    with pytest.raises(ExportError, match=r"runner: cmake failed: .*attention_tile\.cpp:1:1: error"):
        build.build(bundle.abi, compiler=compiler, folder=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_tool_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sdk.UnavailableError, match=r"cmake: not found, .* install cmake"):
        build.build(compilers.host_abi(), folder=tmp_path)
    (tmp_path / "cmake").symlink_to("/bin/true")
    (tmp_path / "make").symlink_to("/bin/true")
    monkeypatch.setattr(compilers, "_zig", lambda: None)
    with pytest.raises(sdk.UnavailableError, match=r"aarch64-linux-gnu-g\+\+: .* install g\+\+-aarch64-linux-gnu"):
        build.build("aarch64", folder=tmp_path)


@pytest.mark.parametrize(
    ("command", "lacking", "line"),
    [
        ("g++", "ld-linux-aarch64.so.1", None),  # Fedora's, which has the loader where it does not look
        ("g++", "libstdc++.so.6", r"^libstdc\+\+\.so\.6: not found beside g\+\+; .*install "),
        (
            "aarch64-linux-gnu-g++",
            "ld-linux-aarch64.so.1",  # the machine's own is of another C library, or another processor
            r"^ld-linux-aarch64\.so\.1: not found beside aarch64-linux-gnu-g\+\+; install libc6-dev-arm64-cross$",
        ),
    ],
)
def test_the_loader_is_found_where_programs_name_it(monkeypatch, tmp_path, command, lacking, line):
    compiler = tmp_path / command
    compiler.write_text(f'#!/bin/sh\nname=${{1#*=}}; [ "$name" = {lacking} ] || printf /usr/lib64/; echo "$name"\n')
    compiler.chmod(0o755)
    (tmp_path / "ld-linux-aarch64.so.1").touch()
    monkeypatch.setattr(compilers, "_LOADER_PLACES", (tmp_path / "none", tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    libraries = partial(compilers.Compiler((command,), ()).system_libraries, build._SYSTEM, tmp_path)
    if line:
        with pytest.raises(sdk.UnavailableError, match=line):
            libraries()
    else:
        assert [path.name for path in libraries()] == list(build._SYSTEM)
        assert libraries()[0] == tmp_path / "ld-linux-aarch64.so.1"


def test_a_wheel_that_cannot_be_had_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(sdk.UnavailableError, match=r"executorch .* for aarch64: pip download failed: ERROR"):
        sdk.find("aarch64", tmp_path / "sdk")
    assert list((tmp_path / "sdk").iterdir()) == []


def test_a_wheel_that_is_not_the_locked_one_is_refused(monkeypatch, tmp_path):
    """An index with an empty wheel of the locked release; the twin has its sha256 in the lock."""
    (pin,) = sdk.with_dependencies("numpy")
    wheel = tmp_path / f"{pin.replace('==', '-')}-cp311-cp311-manylinux_2_28_aarch64.whl"
    described = f"{pin.replace('==', '-')}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{described}/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr(
            f"{described}/METADATA", "Metadata-Version: 2.1\nName: {}\nVersion: {}\n".format(*pin.split("=="))
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", tmp_path.as_uri())  # pip takes a space as the end of one
    (tmp_path / "got").mkdir()
    fetch = partial(sdk.download, [pin], "3.11", ["manylinux_2_28_aarch64"], tmp_path / "got")
    with pytest.raises(ExportError, match=f"^{pin}: the index has another file than .* locks/release.txt") as refused:
        fetch()
    assert not isinstance(refused.value, sdk.UnavailableError)
    monkeypatch.setattr(sdk, "LOCK", tmp_path / "lock.txt")
    sdk.LOCK.write_text(f"{pin} \\\n    --hash=sha256:{digests.sha256(wheel)}\n")
    assert [path.name for path in fetch()] == [wheel.name]


class Mac:
    """Without coremltools; pip there ends as `pip` says."""

    def __init__(self, pip):
        self.pip, self.pushed, self.scripts = pip, {}, []

    def push(self, local, remote, *, timeout_s):
        self.pushed[remote] = local.read_text()

    def run(self, command, *, timeout_s):
        self.scripts.append(command[-1])
        return devices.Completed(1, b"", b"ModuleNotFoundError" if len(self.scripts) == 1 else self.pip)


def test_a_mac_installs_what_the_lock_holds_and_nothing_else():
    said = (
        b"ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. ...\n    sympy==1 from https://x:\n"
    )
    mac = Mac(said + b"        Expected sha256 00\n             Got        11\n")
    with pytest.raises(ExportError, match=r"^sympy==1: the index has another file than .* locks/release.txt"):
        mlpackage.install(mac, devices.load("macbook-m3"), timeout_s=1)
    ((place, pinned),) = mac.pushed.items()
    assert f"--no-deps --only-binary=:all: --require-hashes --requirement {place}" in mac.scripts[-1]
    pins = re.findall(r"^([\w.-]+)==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", pinned, re.MULTILINE)
    assert len(pins) == pinned.count("==")
    assert {"coremltools", "numpy", "protobuf", "sympy", "mpmath", "typing-extensions"} <= set(pins)
    with pytest.raises(ExportError, match=r"coremltools==\S+ cannot be installed there: no room$"):
        mlpackage.install(Mac(b"no room"), devices.load("macbook-m3"), timeout_s=1)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"python3": "3.9.6"}, ""),  # of Apple's command line tools
        ({"python3": "3.14.0"}, ""),
        ({"python3": "3.12.1"}, "python3"),
        ({"python3": "3.14.0", "python3.12": "3.12.1", "python3.11": "3.11.2"}, "python3.12"),
        ({"python3": "3.9.6", "python3.11": "3.11.2"}, "python3.11"),
    ],
)
def test_a_mac_uses_a_python_that_the_wheels_are_for(tmp_path, there, chosen):
    """Each a program that answers as the interpreter of that version would."""
    for name, version in there.items():
        fits = (3, 11) <= tuple(map(int, version.split(".")[:2])) < (3, 14)
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {int(not fits)}\n")
        (tmp_path / name).chmod(0o755)
    script = mlpackage.FIND_PYTHON.replace(":/opt/homebrew/bin:/usr/local/bin", "") + '\necho "$python"'
    ended = subprocess.run(
        ["/bin/sh", "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (ended.stdout.strip(), ended.returncode) == (chosen, int(not chosen))
    assert ended.stderr == ("" if chosen else "it has no Python 3.11 to 3.13: brew install python@3.12\n")


@pytest.mark.linux
def test_no_library_of_the_bundle_comes_from_elsewhere(bundle):
    """The fixture `run` starts it without an environment; here: it names no library but these and the system's."""
    files = [path for path in bundle.path.rglob("*") if path.is_file()]
    ours = {path.name for path in files}
    assert len(ours) == 6
    for path in files:
        command = ["readelf", "-d", path]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        libraries = set(re.findall(r"NEEDED.*\[(.*)\]", listed))
        assert libraries
        assert all(re.match(r"lib(c|m|dl|pthread|gcc_s|stdc\+\+)\.so|ld-linux", name) for name in libraries - ours)
