"""devices imports nothing of ours, export nothing of ours, and no shared code asks which format it has."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"devices", "export", "runtime_tests", "tests"}
ALLOWED = {"devices": set(), "export": set(), "runtime_tests": {"export", "devices"}}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_point_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert set(imported(path)) & OURS <= ALLOWED[package] | {package}, path


def test_no_shared_code_compares_a_backend_or_session_name():
    names = {"backend", "session", "format", "target"}
    shared = [*ROOT.glob("export/*.py"), *ROOT.glob("runtime_tests/*.py"), *ROOT.glob("devices/*.py")]
    for path in shared:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute):
                literal = any(isinstance(value, ast.Constant) and value.value for value in node.comparators)
                assert not (node.left.attr in names and literal), f"{path}:{node.lineno}"
