"""Cached logits: a file that is not whole is made again, and nothing in it is parsed."""

import pickle

import numpy as np
import pytest

from runtime_tests.jobs import logits_file
from tests.support.harms import MARKER, Execute

SHAPE = (2, 3, 5)


def written(path, dtype="<f4", shape=SHAPE):
    np.save(path, np.zeros(shape, dtype))


DAMAGES = {
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Execute())),
    "a pickle in an array": lambda path: np.save(path, np.array([Execute()]), allow_pickle=True),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte too many": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "another header": lambda path: path.write_bytes(b"\x93NUMPY\x09" + path.read_bytes()[7:]),
    "numbers of another kind": lambda path: written(path, "<i4"),
    "another shape": lambda path: written(path, shape=(2, 5, 3)),
    "a zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "gone": lambda path: path.unlink(),
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with logits_file.writing(tmp_path / "reference.npy", SHAPE) as write:
        write(np.ones(SHAPE, np.float32))
    return tmp_path / "reference.npy"


def test_what_was_written_is_whole_and_numpy_reads_it(path):
    assert logits_file.is_whole(path, SHAPE)
    assert np.load(path, mmap_mode="r").tolist() == np.ones(SHAPE).tolist()


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_not_whole(path, tmp_path, damage):
    DAMAGES[damage](path)
    assert not logits_file.is_whole(path, SHAPE)
    assert not (tmp_path / MARKER).exists()
