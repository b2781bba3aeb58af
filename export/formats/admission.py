"""Whether an artifact folder may be opened: it holds exactly what its format writes, and is as its manifest says.

Whatever opens an artifact asks here first, so that verification, validation, chat and all others agree: regular files
of our formats only, with our operators, and configuration as our own writers make it. It is fit for folders of
strangers. A file that is replaced between this and its use is not noticed: whoever can write the user's own folders
needs no artifact for that.
"""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from export import formats, manifest
from export.checkpoints import tokenizer
from export.checkpoints.origin import LARGEST_TOKENIZER_BYTES, TOKENIZER_PATTERNS
from export.errors import ExportError
from export.manifest import Manifest

_PLAIN = re.compile(r"[\w./-]+", re.ASCII)
_TOKENIZER_CONFIG = "tokenizer_config.json"
_LARGEST_CONFIG_BYTES = 2**24
_MOST_FINDINGS = 20
"""That are told of a file's contents; a file may hold millions."""


def admit(folder: Path) -> Manifest:
    """The manifest of a folder that may be opened. Raises ExportError: it may not."""
    described = manifest.read(folder)
    require(folder, described)
    return described


def require(folder: Path, described: Manifest) -> None:
    """Raise ExportError for the first finding."""
    if finding := next(findings(folder, described), None):
        raise ExportError(finding)


def findings(folder: Path, described: Manifest) -> Iterator[str]:
    """Why a folder must not be opened, one line each: files, then what is in them if all files are as they should."""
    problems = list(files(folder, described))
    yield from problems or contents(folder, described)


def files(folder: Path, described: Manifest) -> Iterator[str]:
    """What contradicts the manifest, or is in it and of no build of ours; links first, and nothing else then."""
    if strays := list(manifest.strays(folder)):
        yield from strays
        return
    try:
        own = formats.load(described.plan.target.backend).FILES
    except ExportError as error:
        yield f"{manifest.FILE}: {error}"
        return
    problems = [*_contradictions(described, own), *_unknown_files(described, own)]
    yield from problems or manifest.differing_files(folder, described)


def contents(folder: Path, described: Manifest) -> Iterator[str]:
    """What no build of ours writes into a file of its tokenizer or its model."""
    try:
        yield from _code(folder)
        foreign = formats.vocabulary(described.plan.target.backend).foreign(folder, described)
        yield from islice(foreign, _MOST_FINDINGS)
    except ExportError as error:
        yield str(error)
    except Exception as error:  # parsers of foreign formats raise what they like
        yield f"{folder}: {described.plan.target.artifact} is not readable: {formats.in_a_line(error)}"


def _contradictions(described: Manifest, own: tuple[str, ...]) -> Iterator[str]:
    """Parts of a manifest that cannot be true together."""
    a, kv, plan = described.architecture, described.contract.kv, described.plan
    pairs = (
        ("id", described.id, plan.id),
        ("plan.target.artifact", plan.target.artifact, own[0].partition("/")[0]),
        ("contract.kv.layers", kv.layers, a.num_hidden_layers),
        ("contract.kv.kv_heads", kv.kv_heads, a.num_key_value_heads),
        ("contract.kv.head_dim", kv.head_dim, a.head_dim),
        ("contract.kv.context_length", kv.context_length, plan.model.context_length),
        ("contract.kv.dtype", kv.dtype, formats.cache_of(plan)),
        ("contract.kv.window", kv.window, plan.window),
        ("contract.kv.sink", kv.sink, plan.sink),
        ("contract.kv.frequencies", len(kv.frequencies), kv.head_dim // 2 if plan.sink else 0),
        ("contract.logits", described.contract.logits, plan.target.logits),
    )
    yield from (f"{manifest.FILE}: {name} is {a!r}, expected {b!r}" for name, a, b in pairs if a != b)


def _unknown_files(described: Manifest, own: tuple[str, ...]) -> Iterator[str]:
    """Files that no build writes, and parts of the model that the manifest does not list."""
    for name, info in described.files.items():
        of_tokenizer = any(_matches(name, pattern) for pattern in TOKENIZER_PATTERNS)
        if not of_tokenizer and name not in own:
            yield f"{manifest.FILE}: file {name!r}: no part of an artifact of {described.plan.target.backend}; refused"
        if of_tokenizer and info.bytes > LARGEST_TOKENIZER_BYTES:
            yield f"{manifest.FILE}: file {name!r}: {info.bytes} bytes, which no such file is; refused"
    for name in own:
        if name not in described.files:
            yield f"{manifest.FILE}: files do not hold {name!r}, a part of the artifact; build it again"


def _matches(name: str, pattern: str) -> bool:
    """A `*` stands for a plain name, not for a folder in it."""
    plain = _PLAIN.fullmatch(name) is not None and name.count("/") == pattern.count("/")
    return plain and fnmatchcase(name, pattern)


def _code(folder: Path) -> Iterator[str]:
    """Keys of the tokenizer's configuration that lead away from the folder's own tokenizer.json."""
    path = folder / _TOKENIZER_CONFIG
    if not path.is_file():
        return
    if path.stat().st_size > _LARGEST_CONFIG_BYTES:
        raise ExportError(f"{path}: larger than {_LARGEST_CONFIG_BYTES} bytes; refused")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ExportError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    for key in filter(tokenizer.leads_away, fields):
        if fields[key]:
            yield f"{path}: {key}: names code or other files, which no artifact of ours needs; refused"
