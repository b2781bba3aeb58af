"""Artifacts that the tests of this folder read and do not change."""

from pathlib import Path

import pytest

from export.pipeline import export
from tests.support.onnx import tiny


@pytest.fixture(scope="session")
def artifact(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "tiny"
    export(tiny(), None, out)
    return out


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    """Random weights with a tied head always repeat their last token; an untied head spreads its probabilities."""
    out = tmp_path_factory.mktemp("onnx") / "untied"
    export(tiny(tied=False), None, out)
    return out


@pytest.fixture(scope="session")
def all_logits(tmp_path_factory) -> Path:
    """The same untied model with the logits of every position, for clients that score prompts."""
    out = tmp_path_factory.mktemp("onnx") / "all"
    export(tiny(tied=False, logits="all"), None, out)
    return out
