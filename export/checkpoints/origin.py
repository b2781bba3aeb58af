"""Where a checkpoint is: a user's text, parsed once, the files it stands for and the name they go by. No torch.

`str()` of an origin is the text again; `published` is the one that a manifest holds, without a path of this machine.
Origins are equal where they stand for the same place.
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import ExportError
from export.host.disk import require_utf8
from export.manifest import TEMPLATES
from export.plan import ModelSpec, Plan, cleaned, not_a_file_name

_HUB, _SEED, _PACKAGE, _ADAPTER, _PRIVATE = "hub:", "seed:", "package:", "adapter:", "local:"
_TOKENIZER_JSON, _GENERATION, _META_TOKENIZER = "tokenizer.json", "generation_config.json", "tokenizer.model"
TOKENIZER_FILES = (
    _TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    _GENERATION,
)
"""Of a Hugging Face folder: what the tokenizer and the generation defaults are read from."""
TOKENIZER_PATTERNS = (*TOKENIZER_FILES, f"{TEMPLATES}/*.jinja")
LARGEST_TOKENIZER_BYTES = 2**27
"""Of each of these files; the largest vocabularies take a quarter of it."""
_TOKENIZER_NAMES = frozenset({*TOKENIZER_FILES, _META_TOKENIZER})
ADAPTER_CONFIG = "adapter_config.json"
NOT_AN_ADAPTER = "; --adapter must be a folder that peft's save_pretrained wrote"
_MOST_CONFIG_BYTES = 2**24
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_GGUF = ".gguf"
_WEIGHTS = (".safetensors", _GGUF, ".pth")


@dataclass(frozen=True)
class _Local:
    path: Path
    text: str = field(compare=False, repr=False)
    """As it was given, perhaps relative to another working folder."""

    def __str__(self) -> str:
        return self.text


class Folder(_Local):
    """A Hugging Face folder, one of Meta's, or a LoRA adapter's."""


class File(_Local):
    """A GGUF file, by the name that was given: a link into a hub's cache leads to a blob named by a digest."""


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub; revision None: its main branch."""

    repo: str
    revision: str | None
    text: str = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Package:
    """A file inside an installed Python package."""

    name: str
    file: str

    def __str__(self) -> str:
        return f"{_PACKAGE}{self.name}/{self.file}"

    @property
    def path(self) -> Path:
        """The file's; no package is imported. Raises ExportError: not installed, or without the file."""
        if not self.name.isidentifier() or not_a_file_name(self.file):  # to find `a.b` is to import `a`
            raise ExportError(f"source {str(self)!r}: expected package:NAME/FILE, a package and a file inside of it")
        try:
            spec = importlib.util.find_spec(self.name)
        except (ImportError, ValueError):  # a module without a spec
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ExportError(f"package {self.name!r} is not installed: run `make setup`, or give --source")
        path = Path(spec.submodule_search_locations[0]) / self.file
        if not path.is_file():
            raise ExportError(f"{path}: missing; reinstall the package {self.name!r}")
        return path


@dataclass(frozen=True)
class Seed:
    """Random weights."""

    number: str

    def __str__(self) -> str:
        return f"{_SEED}{self.number}"


@dataclass(frozen=True)
class Adapter:
    """A checkpoint with the LoRA adapter in a folder merged into it."""

    adapter: Folder | File
    base: Folder | File | Hub | Package

    def __str__(self) -> str:
        return joined(_single_slashes(str(self.adapter)), _single_slashes(str(self.base)))


Origin = Folder | File | Hub | Package | Seed | Adapter


def parse_origin(text: str) -> Origin:
    """`source` of a model YAML, a --source, or the origin that a manifest holds.

    Raises ExportError: no such file or folder, or none of the forms above.
    """
    if text.startswith(_ADAPTER):
        return _parse_adapter(text)
    if text.startswith(_PACKAGE):
        name, _, file = text.removeprefix(_PACKAGE).partition("/")
        return Package(name, file)
    if text.startswith(_PRIVATE):
        raise ExportError(f"{text}: a checkpoint whose place is not told; give its folder or file with --source")
    if text.startswith(_SEED):
        if not (number := text.removeprefix(_SEED)).isdecimal():
            raise ExportError(f"source {text!r}: the seed must be a whole number")
        return Seed(number)
    if text.startswith(_HUB):
        return _hub(text.removeprefix(_HUB), text)
    if not text:
        raise ExportError("--source is empty; give a folder, a .gguf file or a hub id")
    path = Path(os.path.expanduser(text))  # noqa: PTH111  (Path's own raises for an unknown user)
    if os.path.lexists(path):  # Path's own raises for a name that is too long
        return _local(path, text)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _hub(text, text)
    raise ExportError(f"{text}: no such file or folder (and not a hub id like owner/name)")


def origin_of(model: ModelSpec, source: Origin | None) -> Origin:
    """Where the weights come from: `source`, or the model's own."""
    if source is not None:
        return source
    if model.source is None:
        raise ExportError(f"model {model.name!r} has no weights of its own: give --source DIR")
    return parse_origin(model.source)


def chosen_origin(source: str | Path | None, adapter: str | Path | None) -> Origin | None:
    """Where a build's weights come from, by its options; None: from where the model's YAML says.

    An adapter without a source is merged into the checkpoint that it names. Raises ExportError: no such file or folder,
    a base that no adapter is merged into, or one that is not named.
    """
    base = None if source is None else parse_origin(str(source))
    return base if adapter is None else adapted(base, adapter)


def adapted(base: Origin | None, folder: str | Path) -> Adapter:
    """A checkpoint with the adapter in `folder`; None: the one that the adapter names.

    Raises ExportError: no such folder, a base that no adapter is merged into, or that is not where it is named.
    """
    if isinstance(base, Adapter | Seed):
        kind = str(base).partition(":")[0]
        raise ExportError(
            f"{joined(str(folder), str(base))}: an adapter is merged into a checkpoint, not into {kind}:…"
        )
    text = _single_slashes(str(folder))
    path = Path(os.path.expanduser(text))  # noqa: PTH111  (see `parse_origin`)
    if not os.path.lexists(path):
        raise ExportError(f"{folder}: no such folder; download the adapter and give its folder")
    adapter = _local(path, text)
    return Adapter(adapter, base or _named_base(adapter.path))


def _local(path: Path, text: str) -> Folder | File:
    """A folder where it really is; a file under its own name, where it is a link to a blob named by a digest."""
    require_utf8(str(path.absolute()))
    if path.is_dir():
        return Folder(Path(require_utf8(str(path.resolve()))), text)
    if not path.exists():
        raise ExportError(f"{text}: a link to {os.readlink(path)}, which is not there")  # noqa: PTH115  (its text)
    return File(path.parent.resolve() / path.name, text)


def _parse_adapter(text: str) -> Adapter:
    folder, base = halves(text)
    if not folder:
        raise ExportError(f"{text}: expected adapter:FOLDER//CHECKPOINT, or adapter:FOLDER for the base that it names")
    return adapted(parse_origin(base) if base else None, folder)


def _named_base(adapter: Path) -> Folder | File | Hub:
    """The checkpoint that an adapter names as its base. Raises ExportError: none, or none that is found by its name."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ExportError(f"{adapter / ADAPTER_CONFIG}: missing{NOT_AN_ADAPTER}")
    name, revision = trained_on(adapter)
    if name and os.path.lexists(os.path.expanduser(name)):  # noqa: PTH111  (see `parse_origin`)
        return _local(Path(os.path.expanduser(name)), name)  # noqa: PTH111
    if name and _HUB_ID.fullmatch(name):
        return Hub(name, revision, f"{_HUB}{name}" + (f"@{revision}" if revision else ""))
    named = f"names as its base {name!r:.200}, which is not here" if name else "names no base"
    raise ExportError(f"{adapter / ADAPTER_CONFIG}: {named}; give the base with --source")


def trained_on(adapter: Path) -> tuple[str, str | None]:
    """The base and its revision as an adapter's configuration names them; empty: it names none.

    The whole configuration is checked where it is merged (`lora.py`); what is odd in it names nothing here.
    """
    try:
        fields = json.loads((adapter / ADAPTER_CONFIG).read_bytes()[:_MOST_CONFIG_BYTES])
    except (OSError, ValueError, RecursionError):
        fields = None
    told = fields if isinstance(fields, dict) else {}
    name, revision = told.get("base_model_name_or_path"), told.get("revision")
    return name if isinstance(name, str) else "", revision if isinstance(revision, str) and revision else None


def published_base(adapter: Path) -> str:
    """The base that an adapter names, as a manifest says it: a hub id, or a path's last part."""
    name, revision = trained_on(adapter)
    if _HUB_ID.fullmatch(name):
        return f"{_HUB}{name}" + (f"@{revision}" if revision else "")
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return f"{_PRIVATE}{last:.80}" if last else "unknown"


def is_named_base(adapter: Path, base: Origin) -> bool:
    """Whether an adapter names this checkpoint; where nothing is here by its name, whether the two have one name."""
    with suppress(ExportError):
        return _named_base(adapter) == base
    return published_base(adapter) == published(base)


def _single_slashes(path: str) -> str:
    """The same path, with no `//` in it and none at its end."""
    return re.sub(r"/+", "/", path if path.strip("/") == "" else path.rstrip("/"))


def _hub(repo: str, text: str) -> Hub:
    name, _, revision = repo.partition("@")
    return Hub(name, revision or None, text)


def published(origin: Origin) -> str:
    """What a manifest and a card say of an origin: of a path its last part only, where the digests identify it."""
    match origin:
        case Adapter():
            return joined(published(origin.adapter), published(origin.base))
        case Folder() | File():
            return f"{_PRIVATE}{_last_part(origin)}"
        case Hub():
            return f"{_HUB}{origin.repo}" + (f"@{origin.revision}" if origin.revision else "")
        case _:
            return str(origin)


def absolute(origin: Origin) -> str:
    """The text of an origin that means the same in every working folder."""
    match origin:
        case Adapter():
            return joined(absolute(origin.adapter), absolute(origin.base))
        case Folder() | File():
            return str(origin.path)
        case _:
            return published(origin)


def published_plan(plan: Plan) -> Plan:
    """The plan as a manifest holds it: a model's own YAML may name a path too."""
    model = plan.model
    with suppress(ExportError):
        if model.source is not None and is_private(told := published(parse_origin(model.source))):
            return plan.model_copy(update={"model": model.model_copy(update={"source": told})})
    return plan


def halves(text: str) -> tuple[str | None, str]:
    """An origin's adapter, if it has one, and the checkpoint without it, as texts that need not lead anywhere."""
    if not text.startswith(_ADAPTER):
        return None, text
    adapter, _, base = text.removeprefix(_ADAPTER).partition("//")
    return adapter, base


def joined(adapter: str | None, base: str) -> str:
    """The text of the two again."""
    return base if adapter is None else f"{_ADAPTER}{adapter}//{base}"


def is_private(text: str) -> bool:
    """Whether a manifest's origin names a path without telling it."""
    return any(part.startswith(_PRIVATE) for part in halves(text) if part)


def is_public(text: str) -> bool:
    """Whether a manifest's origin means the same on every machine."""
    return text.startswith((_HUB, _SEED, _PACKAGE))


def hub_id(text: str) -> str | None:
    """OWNER/NAME of a manifest's origin; None: it is of another kind."""
    return _hub(text.removeprefix(_HUB), text).repo if text.startswith(_HUB) else None


def last_part(text: str) -> str | None:
    """The last part of a path that a manifest's origin does not tell; None: it is of another kind."""
    return text.removeprefix(_PRIVATE) if text.startswith(_PRIVATE) else None


def name_for(model: ModelSpec, origin: Origin | None) -> str:
    """The name of a model's artifact: the model's own, or that of another checkpoint, or of an adapter.

    Raises ExportError: no name can be made of that.
    """
    if origin is None:
        return model.name
    with suppress(ExportError):  # a model's own path may be missing where another is given
        if model.source is not None and origin == parse_origin(model.source):
            return model.name
    return cleaned(_own_name(origin))


def _own_name(origin: Origin) -> str:
    match origin:
        case Adapter():
            return _own_name(origin.adapter)
        case Folder():
            snapshots = origin.path.parent
            in_cache = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
            return snapshots.parent.name.rpartition("--")[2] if in_cache else _last_part(origin)
        case Hub():
            return origin.repo.rpartition("/")[2]
        case File() | Package():
            name = _last_part(origin) if isinstance(origin, File) else origin.file.rpartition("/")[2]
            return name[: -len(_GGUF)] if name.lower().endswith(_GGUF) else name
        case Seed():
            return f"seed-{origin.number}"


def _last_part(origin: Folder | File) -> str:
    """Of the path as it was given, through whatever links; `.` has one too."""
    return os.path.basename(os.path.abspath(os.path.expanduser(origin.text)))  # noqa: PTH100, PTH111, PTH119


def is_meta(folder: Path) -> bool:
    """Meta's own files have a params.json, all other folders a config.json."""
    return (folder / "params.json").is_file() and not (folder / "config.json").is_file()


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files in a checkpoint's folder that its tokenizer and its generation defaults are read from.

    Raises ExportError: one is larger than any, such as a file with holes, of which a copy fills the disk.
    """
    if is_meta(folder):
        paths = [folder / _META_TOKENIZER]
    else:
        paths = [*(folder / name for name in TOKENIZER_FILES), *sorted((folder / TEMPLATES).glob("*.jinja"))]
    found = tuple(path for path in paths if path.is_file())
    for path in found:
        if path.stat().st_size > LARGEST_TOKENIZER_BYTES:
            raise ExportError(f"{path}: larger than {LARGEST_TOKENIZER_BYTES} bytes, which no such file is")
    return found


def name_of(path: Path) -> str:
    """A checkpoint's file as manifests and keys name it: without its folder, but for a further chat template's."""
    return f"{TEMPLATES}/{path.name}" if path.parent.name == TEMPLATES else path.name


def telling(names: Iterable[str]) -> str | None:
    """The file of a checkpoint whose digest tells it from others: one of weights, where there is one."""
    return min(names, key=lambda name: not name.endswith(_WEIGHTS), default=None)


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of that name is one of the tokenizer's, not of the weights."""
    return name in _TOKENIZER_NAMES or name.startswith(f"{TEMPLATES}/")


def adapted_tokenizer_files(adapter: Path, base: Iterable[Path]) -> tuple[Path, ...]:
    """The same for a checkpoint with an adapter: the adapter's where it brings a tokenizer, else the base's.

    Generation defaults that an adapter does not bring are the base's.
    """
    own = {path.name: path for path in tokenizer_files(adapter)}
    if _TOKENIZER_JSON not in own:
        return tuple(base)
    defaults = (_GENERATION, _META_TOKENIZER) if _GENERATION not in own else ()
    return (*own.values(), *(path for path in base if path.name in defaults))
