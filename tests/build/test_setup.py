"""`.ci/venv`: which Python the set-up takes, what becomes of an environment that is there, what it says of neither."""

import os
import shutil
import subprocess
import sys

import pytest

from export.manifest import ROOT

_FAKE = """#!/bin/sh
case "$2" in
  *python_version*) echo {version} ;;
  *sys.exit*) exit {wrong} ;;
  venv) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
esac
"""


@pytest.fixture
def path(tmp_path):
    """A PATH with fake Pythons: `path("python3", "3.9.6")` adds one."""
    (tmp_path / "bin").mkdir()

    def add(name, version, folder=tmp_path / "bin"):
        fits = (3, 11) <= tuple(map(int, version.split(".")[:2])) < (3, 14)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(_FAKE.format(version=version, wrong=0 if fits else 1))
        (folder / name).chmod(0o755)

    return add


def made(tmp_path, *words):
    return subprocess.run(
        ["sh", str(ROOT / ".ci/venv"), str(tmp_path / "venv"), *words],
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def version_of(tmp_path):
    text = (tmp_path / "venv/bin/python").read_text()
    return text.partition("echo ")[2].partition(" ")[0]


def test_python3_is_taken_where_it_fits(path, tmp_path):
    path("python3", "3.12.1")
    path("python3.13", "3.13.0")
    assert made(tmp_path).stdout == f"setting up {tmp_path}/venv with python3, Python 3.12.1 (a few minutes)\n"
    assert version_of(tmp_path) == "3.12.1"


@pytest.mark.parametrize("unfit", ["3.9.6", "3.10.12", "3.14.0"])
def test_else_the_newest_that_fits(unfit, path, tmp_path):
    path("python3", unfit)
    path("python3.12", "3.12.8")
    path("python3.13", "3.13.2")
    assert "with python3.13, Python 3.13.2" in made(tmp_path).stdout


def test_the_one_that_is_named_wins_over_the_one_that_is_there(path, tmp_path):
    path("python3", "3.12.1")
    path("python3.11", "3.11.9")
    made(tmp_path)
    made(tmp_path, "python3.11")
    assert version_of(tmp_path) == "3.11.9"


def test_an_environment_that_fits_stays(path, tmp_path):
    path("python3", "3.12.1")
    made(tmp_path)
    (tmp_path / "venv/kept").touch()
    path("python3", "3.13.0")
    assert "which has Python 3.12.1" in made(tmp_path).stdout
    assert (tmp_path / "venv/kept").is_file()


@pytest.mark.parametrize("version", ["3.10.1", None])
def test_one_of_another_python_or_a_broken_one_is_made_again(version, path, tmp_path):
    path("python3", "3.12.1")
    if version:
        path("python", version, tmp_path / "venv/bin")
    else:
        (tmp_path / "venv/bin").mkdir(parents=True)
        (tmp_path / "venv/bin/python").symlink_to("/nowhere/python")
    (tmp_path / "venv/kept").touch()
    assert "with python3, Python 3.12.1" in made(tmp_path).stdout
    assert not (tmp_path / "venv/kept").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [((), "error: python3 is Python 3.9.6, and Python 3.11 to 3.13 is needed: install one (uv python install"),
     (("python3.99",), "error: python3.99 is not here, and Python 3.11 to 3.13 is needed")],
)  # fmt: skip
def test_without_one_a_line_says_what_to_install(words, says, path, tmp_path):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        path(name, "3.9.6")
    ended = made(tmp_path, *words)
    assert ended.returncode == 1
    assert ended.stderr.startswith(says)
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


FILES = {"setup": ("pyproject.toml", "constraints.txt"), "audit": ("locks/audit.txt",)}
MADE = {"setup": ".venv", "audit": ".venv-audit"}


@pytest.mark.parametrize("target", FILES)
def test_an_environment_is_of_what_it_was_made_from_whatever_the_times(tmp_path, target):
    """A clone has files that are newer than a copied or linked environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in (".ci", "locks", "elsewhere/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".ci/venv").write_text("echo made >> log\n")
    (tmp_path / ".ci/install").write_text("")
    for name in ("pip", "detect-secrets-hook", "pip-audit"):
        (tmp_path / "elsewhere/bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "elsewhere/bin" / name).chmod(0o755)
    (tmp_path / MADE[target]).symlink_to("elsewhere")
    for name in FILES[target]:
        (tmp_path / name).write_text("one\n")

    def made():
        (tmp_path / "log").write_text("")
        words = ["make", "setup"] if target == "setup" else ["make", ".venv-audit/.ready"]
        ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return bool((tmp_path / "log").read_text())

    assert made()
    for name in FILES[target]:
        os.utime(tmp_path / name, (4e9, 4e9))
    assert not made()
    (tmp_path / FILES[target][-1]).write_text("two\n")
    os.utime(tmp_path / FILES[target][-1], (0, 0))
    assert made()
    assert not made()


def test_the_real_python_makes_a_real_environment(tmp_path):
    (tmp_path / "bin").mkdir()
    ended = made(tmp_path, sys.executable)
    assert ended.returncode == 0, ended.stderr
    assert subprocess.run([tmp_path / "venv/bin/python", "-c", ""], check=False).returncode == 0
