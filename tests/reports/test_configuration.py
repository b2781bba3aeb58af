"""The page of all keys and the JSON Schemas are what the code says, and every YAML of ours follows them."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from runtime_tests.reports import configuration

ROOT = Path(__file__).parents[2]
FILES = [(kind, path) for kind in configuration.KINDS for path in sorted((ROOT / kind.folder).glob("*.yaml"))]


def test_page_and_schemas_are_what_the_command_writes():
    written = {path: (ROOT / path).read_text(encoding="utf-8") for path in configuration.files()}
    assert written == configuration.files(), "run `make configuration`"


@pytest.mark.parametrize(("kind", "path"), FILES, ids=[f"{kind.title} {path.stem}" for kind, path in FILES])
def test_every_yaml_names_its_schema_and_follows_it(kind, path):
    text = path.read_text(encoding="utf-8")
    first, _, reference = text.partition("\n")[0].partition("$schema=")
    assert first == "# yaml-language-server: "
    assert (path.parent / reference).resolve() == ROOT / configuration.SCHEMAS / f"{kind.title}.json"
    jsonschema.validate(yaml.safe_load(text), configuration.schema(kind))


@pytest.mark.parametrize(
    ("title", "changes"),
    [
        ("recipe", {"methd": "rtn"}),
        ("recipe", {"name": "other"}),
        ("recipe", {"layers": {"*.down_proj": {"bits": 5, "group_size": 32}}}),
        ("device", {"transport": {"kind": "shh"}}),
        ("model", {"context_length": 8}),
    ],
)
def test_a_mistake_is_one_in_an_editor_too(title, changes):
    kind, path = next((kind, path) for kind, path in FILES if kind.title == title)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(path.read_text()) | changes, configuration.schema(kind))


@pytest.mark.parametrize("kind", configuration.KINDS, ids=lambda kind: kind.title)
def test_every_key_and_every_record_has_a_meaning(kind):
    made = configuration.schema(kind)
    parts = {kind.title: made, **made.get("$defs", {})}
    assert [name for name, part in parts.items() if not part.get("description", "").strip()] == []
    keys = [(name, key, field) for name, part in parts.items() for key, field in part["properties"].items()]
    assert [f"{name}.{key}" for name, key, field in keys if not field.get("description", "").strip()] == []


def test_layers_are_written_as_a_mapping_and_shown_so():
    schema = configuration.schema(configuration.KINDS[0])
    fields = yaml.safe_load((ROOT / "configs/quant/int4-g32.yaml").read_text())
    jsonschema.validate(fields | {"layers": {"*.down_proj": {"bits": 8, "group_size": None}}}, schema)
    page = configuration.files()[configuration.PAGE]
    assert "| `layers` | name → [WeightScheme](#weightscheme-in-recipe) or `null` | `null` | Schemes of some" in page
    assert "| `bits` | `4` or `8` | required | Of an integer. |" in page
