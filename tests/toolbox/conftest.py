"""What tests of verify and of signatures share."""

import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from export.toolbox import model_checks, verification
from tests.support.artifacts import write_key

FORMATS = ("onnx-cpu", "executorch-xnnpack", "coreml")


@pytest.fixture(params=FORMATS)
def folder(request, tiny, tmp_path):
    """A copy to break, of every format."""
    return shutil.copytree(tiny(request.param), tmp_path / "artifact")


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy to break, of one format."""
    return lambda name: shutil.copytree(tiny(name), tmp_path / "artifact")


@pytest.fixture
def here(monkeypatch):
    """The model is read in this process: no import of the libraries for every case."""
    monkeypatch.setattr(verification, "in_child", lambda folder, limit_s: model_checks.check(folder))


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_key(tmp_path_factory.mktemp("keys"), "key", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def no_child(monkeypatch):
    """Findings of files and manifest only."""
    monkeypatch.setattr(verification, "in_child", lambda folder, limit_s: [])


@pytest.fixture
def command(export_command):
    """Exit code and lines."""

    def run(*arguments):
        code, out, err = export_command(*arguments)
        return code, out.splitlines(), err.splitlines()

    return run
