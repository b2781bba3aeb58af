"""What tests of signatures share."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from export.toolbox import verification
from tests.support.artifacts import write_key


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_key(tmp_path_factory.mktemp("keys"), "key", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def no_child(monkeypatch):
    """The model itself is not read: signatures are of bytes."""
    monkeypatch.setattr(verification, "in_child", lambda folder, limit_s: [])


@pytest.fixture
def command(export_command):
    """Exit code and lines."""

    def run(*arguments):
        code, out, err = export_command(*arguments)
        return code, out.splitlines(), err.splitlines()

    return run
