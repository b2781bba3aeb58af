"""python -m runtime_tests.reports.configuration: docs/configuration.md and configs/schemas, read off the code."""

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
from pydantic import BaseModel

from devices import Device
from export.build.command import run
from export.errors import classes
from export.plan import Mixture, ModelSpec, QuantRecipe, Target
from runtime_tests.evaluation import Evaluation

PAGE, SCHEMAS = Path("docs/configuration.md"), Path("configs/schemas")
_INTRODUCTION = """\
# Configuration

Every key of every YAML, written by `make configuration` from the code that reads them. A file's name is its record's
name. Unknown keys and values are refused with the nearest known ones. In an editor with a YAML language server, the
first line of a file, `# yaml-language-server: $schema=…`, gives completion and checks; the schemas are in
`configs/schemas`. Files in `configs` and `devices` of the current folder go before those of the checkout
([python.md](python.md)).
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Kind(NamedTuple):
    """One kind of YAML."""

    title: str
    folder: str
    record: type[BaseModel]


KINDS = (
    Kind("recipe", "configs/quant", QuantRecipe),
    Kind("mixture", "configs/mixtures", Mixture),
    Kind("model", "configs/models", ModelSpec),
    Kind("target", "configs/targets", Target),
    Kind("device", "devices", Device),
    Kind("evaluation", "configs/evals", Evaluation),
)


@app.command()
def main() -> None:
    """Write the page and a JSON Schema for each kind of YAML."""
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def files() -> dict[Path, str]:
    """Path → text of all that is written."""
    schemas = {SCHEMAS / f"{kind.title}.json": json.dumps(schema(kind), indent=1) + "\n" for kind in KINDS}
    return {PAGE: "\n".join([_INTRODUCTION, *(_section(kind) for kind in KINDS)]), **schemas}


def schema(kind: Kind) -> dict[str, Any]:
    """JSON Schema of a YAML: the record's, without its name, with docstrings as descriptions."""
    made = kind.record.model_json_schema()
    made["properties"].pop("name")
    made["required"].remove("name")
    for field in made["properties"].values():
        if field.get("default") == []:  # of a list that a YAML writes as a mapping
            field["default"] = None
    for record in _all(kind.record):
        part = made if record is kind.record else made["$defs"].get(record.__name__)
        for key, words in _docstrings(record).items():
            if part and key in part["properties"]:
                part["properties"][key]["description"] = words
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _all(record: type[BaseModel]) -> list[type[BaseModel]]:
    """A record and all that its fields may hold."""
    inner = (part for field in record.model_fields.values() for part in classes(field.annotation))
    return list(dict.fromkeys([record, *(found for part in inner for found in _all(part))]))


def _docstrings(record: type[BaseModel]) -> dict[str, str]:
    """Field → the string below it in the source, bases included."""
    found: dict[str, str] = {}
    for cls in reversed(record.__mro__):
        if cls.__module__.partition(".")[0] not in ("export", "runtime_tests", "devices"):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[field.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return found


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _section(kind: Kind) -> str:
    made = schema(kind)
    parts = [f"## {kind.title.capitalize()}", f"`{kind.folder}/*.yaml`. {_first(made)}", _table(made, kind.title)]
    for name, part in made.get("$defs", {}).items():
        parts += [f"### {name} in {kind.title}", _first(part), _table(part, kind.title)]
    return "\n\n".join(parts) + "\n"


def _first(part: dict[str, Any]) -> str:
    """The first paragraph of a record's docstring."""
    return " ".join(str(part.get("description", "")).split("\n\n")[0].split())


def _table(part: dict[str, Any], title: str) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in part["properties"].items():
        default = "required" if key in part.get("required", []) else f"`{json.dumps(field.get('default'))}`"
        values, meaning = dict.fromkeys(_values(field, title)), str(field.get("description", "")).replace("|", "\\|")
        lines.append(f"| `{key}` | {' or '.join(values)} | {default} | {meaning} |")
    return "\n".join(lines)


def _values(field: dict[str, Any], title: str) -> Iterator[str]:
    """What a field may hold, in words."""
    if options := field.get("anyOf") or field.get("oneOf"):
        for option in options:
            yield from _values(option, title)
    elif "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        yield f"[{name}](#{name.lower()}-in-{title})"
    elif "enum" in field or "const" in field:
        yield from (f"`{value}`" for value in field.get("enum", [field.get("const")]))
    elif field.get("type") == "array":
        yield f"list of {' or '.join(_values(field['items'], title))}"
    elif field.get("type") == "object":
        yield f"name → {' or '.join(_values(field['additionalProperties'], title))}"
    elif field.get("type") == "null":
        yield "`null`"
    else:
        words = {"integer": "whole number", "string": "text", "boolean": "`true` or `false`"}
        kind = field.get("type", "anything")
        yield words.get(kind, kind) + "".join(
            f" {sign} {field[key]:g}"
            for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
            if key in field
        )


if __name__ == "__main__":
    sys.exit(run(app))
