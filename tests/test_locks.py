"""What releases and boards install is what was seen working together, byte for byte."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from export.manifest import ROOT
from runtime_tests.device_runner import sdk
from tests.support import shape

PEERS = {"llama_cpp_python", "diskcache"}
"""Compiled for benchmarks only."""


def pins(name):
    return set(re.findall(r"^([\w.-]+==[^\s;]+)", (ROOT / name).read_text(), re.MULTILINE))


def plain(pin):
    """Indexes take all of these for one name."""
    return re.sub(r"[-_.]+", "-", pin.lower())


def test_the_lock_holds_every_constraint_with_hashes():
    constraints = {plain(pin) for pin in pins("constraints.txt") if pin.split("==")[0] not in PEERS}
    assert {plain(pin) for pin in pins("locks/release.txt")} == constraints
    for path in (ROOT / "locks").iterdir():
        for block in re.split(r"\n(?=[\w.-]+==)", path.read_text())[1:]:
            assert "--hash=sha256:" in block, block.splitlines()[0]


def declared():
    """Every distribution that pyproject.toml names, with the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [*project["dependencies"], *(word for extra in project["optional-dependencies"].values() for word in extra)]
    return {plain(re.match(r"[\w.-]+", word)[0]) for word in words}


def imported():
    """Top-level modules of others that any code of ours imports."""
    for path in shape.tracked("export", "runtime_tests", "devices", "tests", "llama_on_device.py"):
        for node in ast.walk(shape.tree(path)) if path.suffix == ".py" else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            yield from (name.partition(".")[0] for name in names)


def test_whatever_is_imported_is_declared():
    """And not only there because something else happens to need it."""
    homes, known = packages_distributions(), declared()
    others = set(imported()) - sys.stdlib_module_names - {*shape.PRODUCT, "tests"}
    undeclared = {name: homes[name] for name in others & homes.keys() if not known & set(map(plain, homes[name]))}
    assert undeclared == {}


@pytest.mark.parametrize("name", ["executorch", "onnxruntime", "numpy"])
def test_a_board_gets_wheels_whose_digests_are_known(name):
    (pin,) = (pin for pin in pins("constraints.txt") if pin.startswith(f"{name}=="))
    first, *hashes = sdk.locked(pin).splitlines()
    assert first == f"{pin} \\"
    assert hashes
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes)
    with pytest.raises(sdk.UnavailableError, match=r"no hashes of .*==0; run `make setup`"):
        sdk.locked(f"{name}==0")


TOKEN = f"hf_{'a' * 34}"  # built here, so that no file holds one
UNREACHED = "Traceback ...\n  File ...\nrequests.exceptions.ConnectionError: no pypi.org\n"
AUDITS = {
    "nothing": ({}, "", 0, "No known vulnerabilities found"),
    "a vulnerability": ({"pip-audit": (1, "Found 1 known vulnerability in 1 package\n")}, "", 2, "Found 1 known"),
    "no network": ({"pip-audit": (1, UNREACHED)}, "", 2, "requests.exceptions.ConnectionError: no pypi.org"),
    "a secret": ({"detect-secrets-hook": (1, "Secret Type: AWS Access Key\n")}, "", 2, "Secret Type: AWS Access Key"),
    "a token of the hub": ({}, f"HF_TOKEN={TOKEN} make", 2, "error: tokens of the Hugging Face hub"),
}


@pytest.mark.parametrize("found", AUDITS)
def test_an_audit_is_green_only_where_everything_was_looked_at(tmp_path, found):
    programs, notes, code, words = AUDITS[found]
    for name in ("Makefile", "configs", "devices", "locks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv-audit/bin").mkdir(parents=True)
    good = {"pip-audit": (0, "No known vulnerabilities found\n"), "detect-secrets-hook": (0, "")}
    for name, (status, said) in (good | programs).items():
        program = tmp_path / ".venv-audit/bin" / name
        program.write_text(f"#!/bin/sh\necho {name} \"$@\" >> calls\nprintf %s '{said}' >&2\nexit {status}\n")
        program.chmod(0o755)
    (tmp_path / "notes.md").write_text(notes)
    for words_of_git in (["init", "-q"], ["add", "notes.md"]):
        subprocess.run(["git", *words_of_git], cwd=tmp_path, check=True)
    command = ["make", "--no-print-directory", "-o", ".venv-audit/.ready", "audit"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = [line for line in ended.stderr.splitlines() if not re.match(r"make(\[\d+\])?:", line)]
    assert ended.returncode == code
    assert lines[0].startswith(words)
    assert len(lines) == 1
    assert TOKEN not in ended.stdout + ended.stderr
    if "pip-audit" in (calls := (tmp_path / "calls").read_text()):
        assert "--strict --disable-pip" in calls  # else what PyPI does not know counts as harmless
        assert all(f"-r locks/{path.name}" in calls for path in (ROOT / "locks").iterdir())
