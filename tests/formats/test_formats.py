"""A format is one package, one session and one YAML: no other code names it, and all users find it by name."""

import ast
import logging
import shutil

import pytest

from export import card, formats, manifest
from export.build import command
from export.errors import ExportError
from export.toolbox import inspection, model_checks
from tests.conftest import FAKES
from tests.support.shape import ROOT

SHIPPED = sorted({path.name for path in (ROOT / "export").glob("*/*/") if (path / "usage.md.j2").is_file()})
COMPARES = "runtime_tests/bench"
"""Compares several runtimes of a format with each other, by their own names."""
PROTOCOLS = ((formats.load, formats.Format), (formats.reader, formats.Reader))


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("load", "protocol"), PROTOCOLS)
def test_every_format_has_all_that_is_looked_up_by_name(name, load, protocol):
    members = {*vars(protocol), *protocol.__annotations__}
    members = {member for member in members if not member.startswith("_")}
    assert len(members) > 4
    assert members <= set(dir(load(name)))


def packages(name):
    """Names under which a format's libraries are imported."""
    return {tool.replace("-", "_") for tool in formats.load(name).TOOLS}


def uses(code, libraries):
    """Lines that name a format, or import one of its libraries."""
    for node in ast.walk(ast.parse(code)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and node.value in SHIPPED:
            yield node.lineno
        for module in modules:
            if set(module.split(".")) & set(SHIPPED) or module.partition(".")[0] in libraries:
                yield node.lineno


def shared_modules(package):
    """Modules that are neither in a folder nor in a file of a format's name, nor in the room of Core ML."""
    for path in sorted((ROOT / package).rglob("*.py")):
        if not {*path.parent.parts, path.stem} & {*SHIPPED, "coreml"}:
            yield path


@pytest.mark.parametrize("package", ["devices", "export", "runtime_tests"])
def test_a_formats_name_is_used_in_its_own_modules_only(package):
    libraries = set() if package == "runtime_tests" else {library for name in SHIPPED for library in packages(name)}
    assert len(SHIPPED) == 3
    for path in shared_modules(package):
        if not path.is_relative_to(ROOT / COMPARES):
            assert list(uses(path.read_text(), libraries)) == [], path


@pytest.mark.parametrize(
    "code",
    [
        'if session == "pte": pass',
        'match session:\n    case "onnx_kv": pass',
        'TABLE = {"mlpackage": 1}',
        "from .backends.pte.program import write",
        "from .backends import onnx_kv",
        "import export.formats.mlpackage.file",
        "def read():\n    import coremltools as ct",
        "from onnxruntime_genai import Model",
    ],
)
def test_a_use_of_a_formats_name_is_found(code):
    assert list(uses(code, {library for name in SHIPPED for library in packages(name)}))
    assert not list(uses('"""Of pte files."""\nname = "pt"\nimport onnxsim', {"onnx"}))


def test_the_fake_format_is_two_places_and_one_yaml():
    paths = {path.relative_to(FAKES).as_posix() for path in FAKES.rglob("*fake*") if "__pycache__" not in path.parts}
    assert paths == {"backends/fake", "sessions/fake.py", "targets/fake.yaml"}
    assert {path.name for path in (FAKES / "backends/fake").iterdir()} - {"__pycache__"} == {
        "__init__.py",
        "read.py",
        "usage.md.j2",
        "vocabulary.py",
    }


def test_a_fourth_format_is_found_by_all_users(built):
    described, file = manifest.read(built), built / "model.safetensors"
    assert "fake" in formats.names()
    assert described.tools["safetensors"] == formats.tool_versions()["safetensors"]
    assert inspection.inspect(built).contents.format == inspection.inspect(file).contents.format == "test weights"
    assert {layer.scheme for layer in inspection.inspect(built).layers} == {"int4 g32", "int8 per channel"}
    assert model_checks.check(built) == []
    assert "Load it with the test session." in card.render(described, [])
    logging.getLogger("fake.runtime").setLevel(logging.NOTSET)
    command.quiet_libraries()
    assert logging.getLogger("fake.runtime").level == logging.ERROR


def test_without_its_package_the_format_is_unknown_everywhere(built, tmp_path, monkeypatch):
    file = shutil.copytree(built, tmp_path / "copy") / "model.safetensors"
    monkeypatch.setattr(formats, "__path__", [path for path in formats.__path__ if not path.startswith(str(FAKES))])
    assert formats.names() == SHIPPED
    assert not {"safetensors", "fake.runtime"} & {*formats.tool_versions(), *formats.loggers()}
    for lookup in (lambda: formats.load("fake"), lambda: inspection.inspect(built)):
        with pytest.raises(ExportError, match=r"unknown backend 'fake'.*known: mlpackage, onnx_kv, pte"):
            lookup()
    with pytest.raises(ExportError, match=r"known format \(Core ML package, ONNX, ExecuTorch program\)"):
        inspection.inspect(file)
    assert model_checks.check(built)[0].startswith("unknown backend 'fake'")
    with pytest.raises(ExportError, match=r"fake/usage\.md\.j2: missing"):
        card.render(manifest.read(built), [])
