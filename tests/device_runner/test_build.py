"""How the C++ runner is built: once, whole or not at all, and with no libraries but its own."""

import re
import shutil
import subprocess

import pytest

from export.errors import ExportError
from runtime_tests.device_runner import build, sdk


def test_a_bundle_is_built_once(bundle, monkeypatch):
    monkeypatch.setattr(build, "_compile", None)
    assert build.build(bundle.abi) == bundle


def test_a_change_of_sources_is_another_bundle(bundle, monkeypatch, tmp_path):
    shutil.copytree(build.SOURCES, tmp_path / "sources")
    kit, compiler = sdk.find(bundle.abi, build.BUILD / "sdk"), build.compiler_for(bundle.abi)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    assert bundle.path.name == f"{bundle.abi}-{build.digest(kit, compiler)}"
    with (tmp_path / "sources/kernels/attention.h").open("a") as file:
        file.write("\n")
    assert bundle.path.name != f"{bundle.abi}-{build.digest(kit, compiler)}"


def test_a_failed_build_leaves_nothing(bundle, monkeypatch, tmp_path):
    shutil.copytree(build.SOURCES, tmp_path / "sources")
    (tmp_path / "sources/base/memory.cpp").write_text("syntax error\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    with pytest.raises(ExportError, match=r"runner: cmake failed: .*memory\.cpp:1:1: error"):
        build.build(bundle.abi, folder=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_tool_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sdk.UnavailableError, match=r"cmake: not found, .* install cmake"):
        build.build(build.host_abi(), folder=tmp_path)
    (tmp_path / "cmake").symlink_to("/bin/true")
    (tmp_path / "make").symlink_to("/bin/true")
    with pytest.raises(sdk.UnavailableError, match=r"aarch64-linux-gnu-g\+\+: .* install g\+\+-aarch64-linux-gnu"):
        build.build("aarch64", folder=tmp_path)


def test_a_wheel_that_cannot_be_had_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(sdk.UnavailableError, match=r"executorch .* for aarch64: pip download failed: ERROR"):
        sdk.find("aarch64", tmp_path / "sdk")
    assert list((tmp_path / "sdk").iterdir()) == []


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
