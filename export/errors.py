"""Mistakes in one line: the error, and YAML files found, and read as strict records or refused with what is wrong."""

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from stat import S_ISDIR, S_ISFIFO, S_ISREG, S_ISSOCK
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

Record = TypeVar("Record", bound=BaseModel)
CHECKOUT = Path(__file__).parent.parent
SCRIPTS = {"export": "llama-export", "runtime_tests": "llama-validate", "devices": "llama-devices"}
"""Packages → console scripts, where the project is installed (pyproject.toml)."""
_MOST_YAML_BYTES = 2**20
_SPECIAL = tuple("*&!%@`")
"""With which no text of YAML begins, unless it is in quotes."""
_TEXT_BEFORE, _TEXT_AFTER = re.compile(r"[^\s{,]*$"), re.compile(r"^[^\s:,}]*")
_KINDS = (
    (S_ISREG, "a file"),
    (S_ISDIR, "a folder"),
    (S_ISFIFO, "a pipe"),
    (S_ISSOCK, "a socket"),
    (lambda _mode: True, "a device"),
)
_MOST_KNOWN = 30
_MOST_PROBLEMS = 5
"""Listed of one record: all mistakes of a YAML, but not every field of another version's manifest."""


class ExportError(Exception):
    """A plan, file or machine that cannot give the artifact.

    The message is one line: which file, field or layer; what is wrong; what to do.
    """

    def __str__(self) -> str:
        return told(super().__str__())


def told(text: str) -> str:
    """A text for people, with `llama-export` in place of `python -m export` where they have it installed."""
    if "llama_on_device" not in sys.modules:
        return text
    text = text.replace("git checkout", "git -C CHECKOUT checkout")
    return re.sub(r"python -m (\w+)(?![\w.])", lambda found: SCRIPTS.get(found[1], found[0]), text)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"the key {key!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def own_folder(ours: Path) -> Path | None:
    """The user's own files, which go before those in a folder of this checkout: the same folder below the current one.

    None: there is none, the current folder is this checkout, or it is not the user's: beside a manifest.json it may
    have come with an artifact, and of another owner anybody may have put it into /tmp.
    """
    if not ours.is_relative_to(CHECKOUT):
        return None
    own = Path(ours.relative_to(CHECKOUT))
    if not own.is_dir() or own.samefile(ours):
        return None
    top = Path(own.parts[0])
    if os.path.lexists("manifest.json"):
        _say(f"{top}/ is not read here: of an artifact's folder (manifest.json) nothing decides; run in another folder")
        return None
    if (owner := top.lstat().st_uid) not in (0, os.getuid(), Path().stat().st_uid):
        _say(f"{top}/ is not read here: it belongs to another user ({owner}); copy it into a folder of yours")
        return None
    return own


def found(ours: Path, name: str) -> Path:
    """The file of that name among the user's own, else in a folder of this checkout, where it may be missing.

    A file of the user's that takes the place of one of ours is told once.
    """
    own = own_folder(ours)
    if own is None or not (own / name).is_file():
        return ours / name
    if (ours / name).is_file():
        _say(f"{own / name} of this folder is taken, not {ours / name}")
    return own / name


def is_own(file: Path) -> bool:
    """Whether a file that was found is the user's own, not one of this checkout."""
    return not file.is_relative_to(CHECKOUT)


def stems(ours: Path) -> list[str]:
    """Names of all YAMLs of a folder of this checkout, and of the user's own."""
    return sorted({path.stem for folder in (ours, own_folder(ours)) if folder for path in folder.glob("*.yaml")})


@cache
def _say(line: str) -> None:
    logging.getLogger(__name__).warning(line)


def load_record(cls: type[Record], path: Path) -> Record:
    """Read one YAML file strictly; the file's stem is the record's name. Raises ExportError in one line."""
    fields = load_fields(path)
    if "name" in fields:
        raise ExportError(f"{path}: remove the key `name`; the file's name is the name")
    return validated(cls, {"name": path.stem, **fields}, path)


def kind(path: Path) -> str | None:
    """`a file`, `a folder`, `a pipe` and so on; None: nothing is there."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return next(what for is_one, what in _KINDS if is_one(mode))


def absence(path: Path) -> str:
    """What is in the place of a file: `missing`, `a folder, no file`, `a pipe, no file` and so on."""
    what = kind(path)
    return f"{what}, no file" if what else "missing"


def load_fields(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ExportError."""
    if not path.is_file():
        raise ExportError(f"{path}: {absence(path)}; give a YAML file")
    if path.stat().st_size > _MOST_YAML_BYTES:
        raise ExportError(f"{path}: larger than {_MOST_YAML_BYTES} bytes, which no YAML of ours is")
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        fields = yaml.load(text, _Loader)  # noqa: S506 – a SafeLoader
    except yaml.MarkedYAMLError as error:
        raise ExportError(f"{path}: not readable as YAML: {_unreadable(error, text)}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # an impossible date, too deep nesting
        raise ExportError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ExportError(f"{path}: expected `key: value` lines, found {type(fields).__name__}")
    return fields


def _unreadable(error: yaml.MarkedYAMLError, text: str) -> str:
    """`line 2, column 3: found undefined alias '_proj'; write "*_proj" in quotes`."""
    begins = "scanning a" in (error.context or "")  # an alias, an anchor: the character that makes it one is there
    mark = (error.context_mark if begins else error.problem_mark) or error.problem_mark
    if mark is None:
        return " ".join(str(error).split())
    before, after = text[: mark.index].rpartition("\n")[2], text[mark.index :]
    word = f"{_TEXT_BEFORE.findall(before)[0]}{_TEXT_AFTER.findall(after)[0]}"
    hint = ""
    if after[:1] == "\t":
        hint = "; write spaces instead of tabs"
    elif after[:1] in _SPECIAL:
        hint = f'; write "{word}" in quotes' if word.isprintable() else ""
    elif (error.problem or "").startswith("mapping values"):
        hint = "; write text that holds a colon and a space in quotes"
    elif (error.problem or "").startswith("expected <block end>"):
        hint = "; write text that begins with a bracket, or goes on after its quotes, in quotes as a whole"
    problem = " ".join(f"{error.problem}".split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{hint}"


def validated(cls: type[Record], fields: dict[str, Any], path: Path) -> Record:
    """A record of the fields of a file. Raises ExportError that names them."""
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error, cls)}") from None


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to write instead of a word: `did you mean int4-g32?`, or all that is known where nothing is near."""
    words = sorted(known)
    near = get_close_matches(word, words)
    more = ["…"] * (len(words) > _MOST_KNOWN)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join([*words[:_MOST_KNOWN], *more])}"


def explain(error: ValidationError, cls: type[BaseModel] | None = None) -> str:
    """Problems of a record in one line: `group_sise: unknown key (did you mean group_size?); bits: missing`.

    The first few of many, what is missing last. Without the record's class no key is suggested.
    """
    parts = []
    for problem in sorted(error.errors(), key=lambda problem: problem["type"] == "missing"):
        field = ".".join(part if str(part).isprintable() else repr(part) for part in map(str, problem["loc"]))
        reason = _reason(problem, cls)
        parts.append(f"{field}: {reason}" if field else reason)
    more = [f"{len(parts) - _MOST_PROBLEMS} more"] if len(parts) > _MOST_PROBLEMS else []
    return "; ".join([*parts[:_MOST_PROBLEMS], *more])


def _reason(problem: Any, cls: type[BaseModel] | None) -> str:
    loc, given, context = problem["loc"], problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "missing":
            return "missing"
        case "union_tag_not_found":
            return f"{str(context['discriminator']).strip(chr(39))}: missing"
        case "extra_forbidden":
            known = {key for record in _records(cls, loc[:-1]) for key in record.model_fields if key != "name"}
            return f"unknown key ({suggestion(str(loc[-1]), known)})" if known else "unknown key"
        case "literal_error" if isinstance(given, str):
            return f"{given[:100]!r} is unknown ({suggestion(given, _quoted(context['expected']))})"
        case "union_tag_invalid":
            key, tags = str(context["discriminator"]).strip("'"), _quoted(context["expected_tags"])
            return f"{key}: {str(context['tag'])[:100]!r} is unknown ({suggestion(str(context['tag']), tags)})"
    return str(problem["msg"]).removeprefix("Value error, ")


def _quoted(text: str) -> list[str]:
    """The values in pydantic's `'rtn', 'scales' or 'gptq'`, and in its `4 or 8`."""
    return re.findall(r"'([^']*)'", text) or re.findall(r"\d+", text)


def _records(cls: type[BaseModel] | None, loc: Sequence[int | str]) -> list[type[BaseModel]]:
    """The classes that a record in a record may have, found along pydantic's location of an error."""
    here = [cls] if cls else []
    for step in loc:
        fields = [record.model_fields[step] for record in here if step in record.model_fields]
        if fields:
            here = [record for field in fields for record in classes(field.annotation)]
        else:  # an index, a key of a mapping, or the tag of one of several classes
            here = [record for record in here if step in _tags(record)] or here
    return here


def classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """The records that a field may hold: itself, in a union or in a container."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from classes(part)


def _tags(record: type[BaseModel]) -> set[Any]:
    literals = (field.annotation for field in record.model_fields.values() if get_origin(field.annotation) is Literal)
    return {value for literal in literals for value in get_args(literal)}
