"""Finished artifacts: the fake format's target, opening one, and changing one that stays whole."""

import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from export import formats, manifest, pipeline
from export.errors import load_record
from export.formats import admission
from export.plan import Target
from export.toolbox import verification
from runtime_tests.sessions import open_session
from tests.support.processes import FAKES

OWN_LIMITS = {
    "max_mean_kl": 1e9,
    "min_top1": 0.0,
    "min_sqnr_db": -1e9,
    "min_probe_sqnr_db": None,
    "compared_tokens": None,
}
"""Of a target, as an artifact would bring them that is to pass whatever it computes."""
TARGET = load_record(Target, FAKES / "targets/fake.yaml")


def export_with(store, plan, out, source=None):
    """Build an artifact whose quantized weights are taken from a store, or left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "CACHE", store)
        pipeline.export(plan, source, out)
    admission.admit(out)
    return out


def opened(folder):
    """A folder's artifact in its runtime."""
    return open_session(folder, manifest.read(folder), threads=2)


def reseal(folder, **changes):
    """Record the files as they are now: a wrong artifact that is whole."""
    described = manifest.read(folder).model_copy(update={"files": manifest.hash_files(folder), **changes})
    manifest.write(folder, described.model_copy(update={"id": described.plan.id}))


def renamed(folder, name):
    """Give an artifact another model's name, as a build of that model would: id and plan agree, files are recorded."""
    described = manifest.read(folder)
    model = described.plan.model.model_copy(update={"name": name})
    plan = described.plan.model_copy(update={"name": name, "model": model})
    reseal(folder, plan=plan)


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


def write_key(folder, name, private, passphrase=None):
    """NAME.pem and NAME.pub.pem, as openssl writes them."""
    pem = serialization.Encoding.PEM
    lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    paths = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    paths[0].write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    paths[1].write_bytes(public)
    return paths


def spoil_weight(folder, name):
    """Random integers in place of a 4-bit weight's, and the files recorded: an artifact that is wrong and whole."""
    described = manifest.read(folder)
    artifact = folder / described.plan.target.artifact
    stored = formats.reader(described.plan.target.backend).read_weights(artifact, described.architecture)
    codes = next(one.qdata for one in stored if one.name == name).ravel()
    random = np.random.default_rng(0)
    for path in (folder / file for file in described.files if file.startswith(artifact.name)):
        data = path.read_bytes()
        for offset in (0, 8):  # two's complement, or a zero point of 8; the first of two in the lower bits
            low, high = ((codes[first::2] + offset) & 15 for first in (0, 1))
            packed = (low | high << 4).astype(np.uint8).tobytes()
            if (at := data.find(packed)) >= 0:
                path.write_bytes(data[:at] + random.bytes(len(packed)) + data[at + len(packed) :])
                reseal(folder)
                return
    raise AssertionError(f"{name} is in no file of {folder}")


def found(folder):
    """What verify finds, a line each."""
    findings = verification.verify(folder, 100)
    assert all("\n" not in finding for finding in findings)
    return findings


def only(findings, words):
    assert len(findings) == 1, findings
    assert words in findings[0]
