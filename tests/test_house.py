"""The house rules of docs/architecture.md: rooms of few entries, one direction of imports, nouns, private names."""

import ast
import re

import pytest

from tests.support import shape

MOST_ENTRIES = 16
FLOORS = (  # a room imports from floors above its own line only
    {"export.errors"},
    {"export.architecture"},
    {"export.plan"},
    {"export.host"},
    {"export.manifest"},
    {"export.model"},
    {"export.checkpoints"},
    {"export.quantization"},
    {"export.formats"},
    {"export.build"},
    {"export.card"},
    {"export.pipeline"},
    {"export.toolbox"},
    {"export", "export.__main__"},
)
NO_NOUNS = {
    "together", "unchanged", "relayed", "limited", "kept", "measured", "judged", "proven", "orphan", "sides", "own",
    "unfinished", "attached", "seeded", "opening", "published",
}  # fmt: skip
ALLOWED = {"devices": {"export"}, "export": set(), "runtime_tests": {"export", "devices"}}


def floor(room):
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("folder", [*shape.PRODUCT, "configs", "tests"])
def test_no_folder_is_a_corridor(folder):
    crowded = {name: count for name, count in shape.entries(folder).items() if count > MOST_ENTRIES}
    crowded.pop("tests", None)  # one folder for each room of two packages
    assert not crowded


def test_nothing_needs_itself_to_be_loaded():
    assert shape.cycles() == []


def test_a_cycle_would_be_seen(monkeypatch):
    there, back = (shape.Import(a, b, (), 1, lazy=False) for a, b in (("export", "devices"), ("devices", "export")))
    monkeypatch.setattr(shape, "imports", lambda: (there, back))
    assert shape.cycles() == [{"export", "devices"}]


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_point_one_way(package):
    reached = {one.module.partition(".")[0] for one in shape.imports() if one.importer.partition(".")[0] == package}
    assert package in reached
    assert reached <= ALLOWED[package] | {package}


def test_devices_know_of_export_how_mistakes_are_told_and_nothing_else():
    known = {one.module for one in shape.imports() if one.importer.partition(".")[0] == "devices"}
    assert {module for module in known if module.partition(".")[0] == "export"} == {"export.errors"}


def test_rooms_of_export_import_downwards():
    inside = [one for one in shape.imports() if one.importer.partition(".")[0] == "export"]
    upwards = [
        f"{one.importer}:{one.line} {one.module}"
        for one in inside
        if floor(shape.room(one.module)) > floor(shape.room(one.importer))
    ]
    assert not upwards


def test_what_is_private_stays_in_its_module():
    crossed = [f"{i.importer}:{i.line} {i.module}" for i in shape.imports() if any(n.startswith("_") for n in i.names)]
    for name, path in shape.modules().items():
        bound = {i.module.rpartition(".")[2] for i in shape.imports() if i.importer == name and not i.names}
        for node in ast.walk(shape.tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
                crossed += [f"{name}:{node.lineno} {node.attr}"] * bool(re.match(r"_[a-z]", node.attr))
    assert not crossed


def test_modules_are_named_by_nouns():
    assert not {name for name in shape.modules() if name.rpartition(".")[2].strip("_") in NO_NOUNS}


def test_every_test_is_collected(pytestconfig):
    """By default pytest enters no folder of the name `build`, as a room of ours has."""
    left_out = {path.name for path in (pytestconfig.rootpath / "tests").iterdir() if path.is_dir()} & set(
        pytestconfig.getini("norecursedirs")
    )
    assert left_out <= {"__pycache__"}
