"""Bases for adapters, and an adapter that each test may change."""

import shutil

import pytest

from tests.checkpoints.lora.adapters import UNTIED, train
from tests.support.checkpoints import write_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base") / "untied", UNTIED)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base") / "tied")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    train(base, folder)
    return folder


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "adapter")
