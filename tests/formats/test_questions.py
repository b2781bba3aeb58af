"""No shared code branches on the format: whatever depends on it is a function of the format."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HOMES = (
    "export/formats",
    "runtime_tests/sessions",
    "runtime_tests/device_runner",
    "runtime_tests/coreml",
)
"""Folders of the formats' own code."""
NAMES = {"backend", "session", "format", "target"}


def format_names():
    """Every name by which code could recognize a format: of targets, their modules and their files."""
    for path in ROOT.glob("configs/targets/*.yaml"):
        target = yaml.safe_load(path.read_text())
        yield from (
            path.stem,
            target["backend"],
            target["session"],
            target["artifact"],
            Path(target["artifact"]).suffix,
        )


def questions(source, known):
    """Lines that compare with a format's name, or compare a variable of NAMES with any text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            subjects, values = [node.left, *node.comparators], [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            subjects, values = [node.subject], [case.pattern for case in node.cases]
        else:
            continue
        texts = {part.value for value in values for part in ast.walk(value) if isinstance(part, ast.Constant)} - {""}
        texts = {text for text in texts if isinstance(text, str)}
        named = {getattr(subject, "attr", getattr(subject, "id", "")) for subject in subjects} & NAMES
        if texts & known or (named and texts):
            yield node.lineno


def test_no_shared_code_asks_which_format_it_has():
    known = set(format_names())
    for package in ("devices", "export", "runtime_tests"):
        for path in (ROOT / package).rglob("*.py"):
            if not path.relative_to(ROOT).as_posix().startswith(HOMES):
                assert not list(questions(path.read_text(), known)), path


@pytest.mark.parametrize(
    "code",
    [
        'plan.target.backend == "other"',
        'session != "other"',
        'kind == "pte"',
        'kind in ("pte", "other")',
        'path.suffix == ".onnx"',
        '"onnx-cpu" == role.target',
        "match session:\n    case 'other':\n        pass",
        "match kind:\n    case 'other' | 'onnx_kv':\n        pass",
    ],
)
def test_a_question_is_found(code):
    assert list(questions(code, set(format_names()))) == [1]


@pytest.mark.parametrize(
    "code", ['target.backend == ""', "kind == 3", 'device.transport.kind == "adb"', "a.target == b"]
)
def test_comparisons_with_anything_else_are_allowed(code):
    assert not list(questions(code, set(format_names())))
