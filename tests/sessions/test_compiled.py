"""Compiled Core ML packages: found by what they were made of and by which system, kept private and few."""

import os
import stat
import time
from pathlib import Path

import pytest

from runtime_tests.sessions import mlpackage

ct = pytest.importorskip("coremltools")


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "model.mlpackage"
    (folder / "Data").mkdir(parents=True)
    (folder / "Manifest.json").write_text("{}")
    (folder / "Data/weight.bin").write_bytes(b"\0" * 64)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "build/compiled"


@pytest.fixture
def made(monkeypatch, cache):
    """Core ML writes the weights it was given; the packages it compiled, in order."""
    packages = []

    def compile_model(package, place):
        packages.append(package)
        Path(place).mkdir()
        (Path(place) / "weights").write_bytes((Path(package) / "Data/weight.bin").read_bytes())

    monkeypatch.setattr(ct.models.utils, "compile_model", compile_model)
    monkeypatch.setattr(mlpackage, "os_build", lambda: "24B83")
    return packages


def touch(package):
    (package / "Data/weight.bin").touch()


def change(package):
    (package / "Data/weight.bin").write_bytes(b"\1" + b"\0" * 63)


def rename(package):
    (package / "Data/weight.bin").rename(package / "Data/weight.bin.old")
    (package / "Data/weight.bin").write_bytes(b"")


def split(package):
    """The same bytes in a row, as other files."""
    (package / "Data/weight.bin").write_bytes(b"\0" * 32)
    (package / "Data/x.bin").write_bytes(b"\0" * 32)


@pytest.mark.parametrize(("do", "times"), [(touch, 1), (change, 2), (rename, 2), (split, 2)])
def test_a_package_is_compiled_again_when_its_files_are_others(made, package, cache, do, times):
    mlpackage.compiled(package, cache)
    do(package)
    place = mlpackage.compiled(package, cache)
    assert place.name == "model.mlmodelc"  # Core ML looks at the name
    assert (place / "weights").read_bytes() == (package / "Data/weight.bin").read_bytes()
    assert len(made) == times


def test_a_package_elsewhere_is_the_same_and_another_system_is_not(made, package, cache, monkeypatch):
    first = mlpackage.compiled(package, cache)
    assert mlpackage.compiled(package.rename(package.with_name("moved")).rename(package), cache) == first
    monkeypatch.setattr(mlpackage, "os_build", lambda: "25A354")
    assert mlpackage.compiled(package, cache) != first
    assert len(made) == 2


def test_few_stay_those_used_last_in_a_folder_of_the_user_alone(made, package, cache):
    (cache / ".killed-while-it-compiled").mkdir(parents=True)
    os.utime(cache / ".killed-while-it-compiled", (0, 0))
    places = {}
    for number in (0, 1, 2, 3, 0, 4):
        (package / "Data/weight.bin").write_bytes(bytes([number]))
        places[number] = mlpackage.compiled(package, cache)
        time.sleep(0.01)  # clocks of file systems are coarse
    assert len(made) == 5
    assert {number for number, place in places.items() if place.is_dir()} == {0, 2, 3, 4}
    assert len(list(cache.iterdir())) == 4
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("half", [True, False])
def test_what_core_ml_refuses_leaves_nothing_and_is_said_in_its_words(monkeypatch, package, cache, half):
    def refuse(_package, place):
        if half:
            Path(place).mkdir()
        raise RuntimeError("Error compiling model: unsupported opset")

    monkeypatch.setattr(ct.models.utils, "compile_model", refuse)
    with pytest.raises(RuntimeError, match=r"^Error compiling model: unsupported opset$"):
        mlpackage.compiled(package, cache)
    assert list(cache.iterdir()) == []


def test_what_another_process_has_made_meanwhile_is_taken(made, package, cache, monkeypatch):
    own = ct.models.utils.compile_model

    def compile_twice(source, place):
        monkeypatch.setattr(ct.models.utils, "compile_model", own)
        mlpackage.compiled(package, cache)
        own(source, place)

    monkeypatch.setattr(ct.models.utils, "compile_model", compile_twice)
    place = mlpackage.compiled(package, cache)
    assert (place / "weights").is_file()
    assert [folder.name for folder in cache.iterdir()] == [place.parent.name]
