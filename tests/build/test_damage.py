"""Finished artifacts cut short and with flipped bits: hashes catch all of it, and no reader crashes on what is left."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from export import manifest
from export.errors import ExportError
from export.formats import admission
from export.toolbox import verification
from tests.support.fakes import damage
from tests.support.harms import damaged_files, model_files
from tests.support.processes import FAKES

FORMATS = ("onnx-cpu", "executorch-xnnpack", "coreml")
COUNTER = (sys.executable, str(FAKES / "damage.py"))


@pytest.fixture
def folder(request, tiny, tmp_path):
    return shutil.copytree(tiny(request.param), tmp_path / "artifact")


@pytest.mark.reliability("{folder}: graph and weight files cut short, or with one bit flipped", "refused by its hash")
@pytest.mark.parametrize("folder", FORMATS, indirect=True)
def test_damage_is_refused_by_hash_before_a_runtime_opens_the_file(folder, monkeypatch, record_property):
    """`admission` is what validation asks first of all; a damaged file never reaches its later checks."""
    monkeypatch.setattr(verification, "in_child", lambda folder, limit_s: [])
    described = manifest.read(folder)
    admission.require(folder, described)
    counts = {"cut": 0, "flipped": 0}
    for kind, path, data in damaged_files(model_files(folder, described), 60, 150):
        whole = path.read_bytes()
        path.write_bytes(data)
        name = path.relative_to(folder).as_posix()
        with pytest.raises(ExportError, match=rf"{name}: (differs from manifest.json|\d+ bytes, manifest.json says)"):
            admission.require(folder, described)
        (only,) = verification.verify(folder, 100)
        assert str(path) in only
        path.write_bytes(whole)
        counts[kind] += 1
    assert counts["cut"] >= 60
    assert counts["flipped"] >= 150
    record_property("cases", sum(counts.values()))
    record_property("note", f"{counts['cut']} cut, {counts['flipped']} flipped")


@pytest.mark.reliability("the same sealed again, so that only structure and numbers can tell", "no reader crashed")
def test_damage_that_was_sealed_again_never_crashes_a_reader(tiny, tmp_path, record_property):
    """A bit of a weight cannot be told without its hash; how much is found is said in docs/reliability.md."""
    folders = [shutil.copytree(tiny(target), tmp_path / target) for target in FORMATS]
    done = subprocess.run(
        [*COUNTER, "10", "18", *map(str, folders)], cwd=manifest.ROOT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    notes, cases = [], 0
    for target, counts in zip(FORMATS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert {ending for kind in counts.values() for ending in kind} <= {"found", "nothing found"}, (target, counts)
        cut, flipped = (sum(counts[kind].values()) for kind in ("cut", "flipped"))
        assert counts["cut"]["found"] >= cut - 1  # of Core ML's Manifest.json the last byte is a line's end
        notes.append(f"{target}: found {counts['cut']['found']} of {cut} cut, {counts['flipped']['found']} of {flipped}"
                     " flipped")  # fmt: skip
        cases += cut + flipped
    record_property("cases", cases)
    record_property("note", "; ".join(notes))


@pytest.mark.parametrize(
    ("check", "ending"),
    [
        (lambda folder: [], "nothing found"),
        (lambda folder: ["x"], "found"),
        (lambda folder: 1 / 0, "raised"),
        (lambda folder: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
    ],
)
def test_a_crash_is_told_from_a_finding(tmp_path, monkeypatch, check, ending):
    monkeypatch.setattr(damage.model_checks, "check", check)
    assert damage.ending(tmp_path) == ending
