"""Artifacts that all tests of this folder read and none changes."""

from pathlib import Path

import pytest

from export.pipeline import export

from .sample import tiny


@pytest.fixture(scope="session")
def artifact(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "tiny"
    export(tiny(), None, out)
    return out


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    """Random weights with a tied head repeat their last token with certainty; an untied head spreads its bets."""
    out = tmp_path_factory.mktemp("onnx") / "untied"
    export(tiny(tied=False), None, out)
    return out


@pytest.fixture(scope="session")
def all_logits(tmp_path_factory) -> Path:
    """For clients that score prompts: the same untied model with the logits of every position."""
    out = tmp_path_factory.mktemp("onnx") / "all"
    export(tiny(tied=False, logits="all"), None, out)
    return out
