"""A foreign tokenizer.json is first used in a child: what grows, hangs or crashes there is one line."""

import json
import shutil

import pytest

from export.checkpoints import tokenizer
from export.host.processes import Limits
from tests.support.checkpoints import tokenizer_refusal, write_folder


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
    """Less than in earnest: what has no end takes as long as it may."""
    monkeypatch.setattr(tokenizer, "_TRIAL_LIMITS", Limits(memory_bytes=2**28, cpu_s=2, wall_s=60.0))


def doubling(rules):
    return {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}] * rules}}  # fmt: skip


def splitting(pattern):
    def fields(old):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, old["pre_tokenizer"]]}}

    return fields


HOSTILE = {
    "a text doubled 20 times": doubling(20),
    "a text doubled 60 times": doubling(60),
    "a pattern that backtracks": splitting(r"(\w|\w)*\W$|(\s|\s)*Q"),
}


@pytest.mark.hostile(
    "checkpoint", "tokenizers that grow, never end or crash", "one line, within the time and memory of a child"
)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_tokenizer_is_one_line(tmp_path, kind):
    folder = tmp_path / "checkpoint"
    write_folder(folder)
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    change = HOSTILE[kind]
    path.write_text(json.dumps(fields | (change(fields) if callable(change) else change)))
    line = tokenizer_refusal(folder, tmp_path / "out")
    assert line.startswith(f"{path}: encoding its first texts ")
    assert "\n" not in line


def test_the_same_of_an_artifacts_own(tiny, tmp_path):
    folder = shutil.copytree(tiny("onnx-cpu"), tmp_path / "artifact")
    path = folder / "tokenizer.json"
    tokenizer.try_out(path)  # the twin
    path.write_text(json.dumps(json.loads(path.read_text()) | doubling(60)))
    with pytest.raises(Exception, match="encoding its first texts"):
        tokenizer.try_out(path)
