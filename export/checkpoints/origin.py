"""Where a checkpoint is: a user's text, parsed once, and the files it stands for. No torch.

`str()` of an origin is the text again, as the manifest and the keys of caches hold it; origins are equal where they
stand for the same place.
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from export.errors import ExportError
from export.host.disk import require_utf8
from export.manifest import TEMPLATES
from export.plan import ModelSpec, load_named, names, not_a_file_name

_REMEDY = "nothing is downloaded or run on its word; give the checkpoint with --source"
_HUB, _SEED, _PACKAGE, _ADAPTER = "hub:", "seed:", "package:", "adapter:"
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
        return f"{_ADAPTER}{self.adapter}//{self.base}"  # no path holds `//`


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


def told(text: str, source: str | None) -> Origin:
    """The origin of a checkpoint that an artifact is compared with: `source`, or the one that its manifest tells.

    A manifest's word is followed to what is on this machine already, and nothing is downloaded: a seed, a file of a
    package that configs/models names, a hub model in the hub's cache, a path. Raises ExportError: it leads elsewhere.
    """
    return _here(parse_origin(text)) if source is None else parse_origin(source)


def _here(origin: Origin) -> Origin:
    match origin:
        case Adapter():
            base = _here(origin.base)
            assert not isinstance(base, Adapter | Seed)  # what a checkpoint is found at is no other kind
            return replace(origin, base=base)
        case Package() if origin not in (parse_origin(text) for text in _own_sources()):
            raise ExportError(f"{origin}: told by the artifact, and no model of configs/models has it: {_REMEDY}")
        case Hub():
            return _cached(origin)
        case _:
            return origin


def _own_sources() -> Iterator[str]:
    """Where the models of configs/models come from."""
    specs = (load_named(ModelSpec, "models", name) for name in names("models"))
    return (spec.source for spec in specs if spec.source and spec.source.startswith(_PACKAGE))


def _cached(origin: Hub) -> Folder:
    """Its snapshot in the hub's cache, under the same text."""
    from huggingface_hub import try_to_load_from_cache

    cached = None
    if not_a_file_name(origin.revision or "main") is None:
        with suppress(ValueError):  # no name that a repository can have
            cached = try_to_load_from_cache(origin.repo, "config.json", revision=origin.revision)
    if not isinstance(cached, str):
        raise ExportError(f"{origin}: told by the artifact, and not in the hub's cache of this machine: {_REMEDY}")
    return Folder(Path(cached).parent, origin.text)


def origin_of(model: ModelSpec, source: Origin | None) -> Origin:
    """Where the weights come from: `source`, or the model's own."""
    if source is not None:
        return source
    if model.source is None:
        raise ExportError(f"model {model.name!r} has no weights of its own: give --source DIR")
    return parse_origin(model.source)


def adapted(base: Origin, folder: Path) -> Adapter:
    """A checkpoint with the adapter in `folder`; its text holds the absolute path.

    Raises ExportError: no such folder, or a base that no adapter is merged into.
    """
    absolute = Path(os.path.expanduser(folder)).resolve()  # noqa: PTH111  (see `parse_origin`)
    return _adapter(str(absolute), base)


def chosen_origin(model: ModelSpec, source: str | Path | None, adapter: str | Path | None) -> Origin | None:
    """Where a build's weights come from, by its options; None: from where the model's YAML says."""
    origin = None if source is None else parse_origin(str(source))
    return origin if adapter is None else adapted(origin_of(model, origin), Path(adapter))


def _local(path: Path, text: str) -> Folder | File:
    """A folder where it really is; a file under its own name, where it is a link to a blob named by a digest."""
    require_utf8(str(path.absolute()))
    if path.is_dir():
        return Folder(Path(require_utf8(str(path.resolve()))), text)
    if not path.exists():
        raise ExportError(f"{text}: a link to {os.readlink(path)}, which is not there")  # noqa: PTH115  (its text)
    return File(path.parent.resolve() / path.name, text)


def _parse_adapter(text: str) -> Adapter:
    folder, separator, base = text.removeprefix(_ADAPTER).partition("//")
    if not (folder and separator):
        raise ExportError(f"{text}: expected adapter:FOLDER//CHECKPOINT")
    return _adapter(folder, parse_origin(base))


def _adapter(folder: str, base: Origin) -> Adapter:
    if isinstance(base, Adapter | Seed):
        kind = str(base).partition(":")[0]
        raise ExportError(f"{_ADAPTER}{folder}//{base}: an adapter is merged into a checkpoint, not into {kind}:…")
    adapter = parse_origin(folder)
    if not isinstance(adapter, Folder | File):
        raise ExportError(f"{folder}: no such folder; download the adapter and give its folder")
    return Adapter(adapter, base)


def _hub(repo: str, text: str) -> Hub:
    name, _, revision = repo.partition("@")
    return Hub(name, revision or None, text)


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
