"""Finished artifacts: the fake format's target, opening one, and changing one that stays whole."""

import json
from pathlib import Path

import pytest

from export import manifest, pipeline
from export.plan import Target, load_record
from runtime_tests.sessions import open_session
from tests.support.processes import FAKES

TARGET = load_record(Target, FAKES / "targets/fake.yaml")


def export_with(store, plan, out):
    """Build an artifact whose quantized weights are taken from a store, or left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "CACHE", store)
        pipeline.export(plan, None, out)
    return out


def opened(folder):
    """A folder's artifact in its runtime."""
    return open_session(folder, manifest.read(folder), threads=2)


def reseal(folder, **changes):
    """Record the files as they are now: a wrong artifact that is whole."""
    described = manifest.read(folder)
    manifest.write(folder, described.model_copy(update={"files": manifest.hash_files(folder), **changes}))


def set_fault(folder, fault):
    (folder / "model.fault").write_text(fault)
    reseal(folder)


def edit_manifest(folder, change):
    path = folder / manifest.FILE
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


COMPANIONS = (
    *(".gitattributes", ".git/config", ".cache/huggingface/download/model.metadata", ".huggingface/x", ".DS_Store"),
    *("._model.onnx", "Thumbs.db", "desktop.ini", "README.md~", ".manifest.json.swp", "__MACOSX/._model.onnx"),
    *("@eaDir/model.onnx@SynoEAStream", "model.onnx.dvc", "LICENSE", "USE_POLICY.md", "lost+found/x"),
)
"""Files that hubs, git, file managers and editors put into a folder."""


def add_companions(folder: Path) -> None:
    """Put one of each into an artifact folder."""
    for name in COMPANIONS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
