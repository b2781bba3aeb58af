"""Whether an artifact folder holds what a build would write again. Imports no torch: an unchanged build ends at once.

The resolved plan, the bytes of the checkpoint and of the calibration texts, our code, the versions of the tools and the
artifact's own files are compared. What cannot be compared counts as changed.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from export import formats, manifest
from export.checkpoints import whereabouts
from export.checkpoints.origin import (
    Adapter,
    File,
    Folder,
    Hub,
    Origin,
    Package,
    Seed,
    adapted_tokenizer_files,
    is_of_tokenizer,
    name_of,
    origin_of,
    published,
    published_plan,
    tokenizer_files,
)
from export.errors import ExportError, found
from export.formats import admission
from export.host import digests
from export.host.console import console
from export.manifest import Manifest, flat
from export.plan import CONFIGS, Plan, shortened


def is_stale(plan: Plan, source: Origin | None, folder: Path, explain: bool = False) -> bool:
    """Whether a build of `plan` into `folder` would write something else; prints that it would not, or why it would."""
    changes = reasons(plan, source, folder)
    if not changes:
        whereabouts.remember(origin_of(plan.model, source), manifest.read(folder).checkpoint.sha256)
        console.print(f"{folder}: up to date", soft_wrap=True)
    for reason in changes if explain else ():
        console.print(f"{plan.id}: {reason}", soft_wrap=True)
    return bool(changes)


def reasons(plan: Plan, source: Origin | None, folder: Path) -> list[str]:
    """Why a build of `plan` into `folder` would write something else, a line each; empty: it would not."""
    if not (folder / manifest.FILE).is_file():
        return ["not built yet"]
    try:
        built = manifest.read(folder)
        fitting = shortened(plan, built.architecture.max_position_embeddings)
        changes = [*_changed_plan(built.plan, published_plan(fitting)), *_changed_inputs(built, plan, source)]
        if not changes:
            admission.require(folder, built)
    except ExportError as error:
        return [str(error).partition("; build")[0]]
    return changes


def _changed_plan(built: Plan, plan: Plan) -> Iterator[str]:
    was, now = flat(built.model_dump()), flat(plan.model_dump())
    for name in was | now:
        if was.get(name) != now.get(name):
            yield f"{name}: {now.get(name)}, was {was.get(name)}"


def _changed_inputs(built: Manifest, plan: Plan, source: Origin | None) -> Iterator[str]:
    """Weights, texts, tools and code."""
    origin = origin_of(plan.model, source)
    if built.checkpoint.origin != published(origin):
        yield f"checkpoint: {published(origin)}, was {built.checkpoint.origin}"
    else:
        yield from (change.text for change in changed_files(built.checkpoint.sha256, origin))
    yield from _changed_texts(built.texts)
    for tool, version in formats.tool_versions().items():
        if (was := built.tools.get(tool)) != version:
            yield f"{tool}: {version}, was {was}"
    if digests.artifact_digest() != built.source.sha256:
        yield f"export/: changed since commit {built.source.revision}"


class FileChange(NamedTuple):
    """A file of a checkpoint that is not as an artifact was made of it."""

    name: str
    """As manifests name it."""
    text: str
    is_gone: bool = False


def changed_files(recorded: dict[str, str], origin: Origin) -> Iterator[FileChange]:
    """Files of the checkpoint that are gone, changed or new; weights beside the recorded ones are not part of it."""
    of_tokenizer = {name_of(path): path for path in tokenizer_of(origin)}
    for name, digest in recorded.items():
        paths = [of_tokenizer.get(name)] if is_of_tokenizer(name) else _weight_files(origin, name)
        files = [path for path in paths if path is not None and path.is_file()]
        if not files:
            yield FileChange(name, f"{name}: not found in {origin}", is_gone=True)
        elif all(digests.remembered_sha256(path) != digest for path in files):
            yield FileChange(name, f"{files[0]}: changed")
    for path in (*(of_tokenizer[name] for name in sorted(of_tokenizer)), *_preferred(origin, recorded)):
        if path.name not in recorded:
            yield FileChange(path.name, f"{path}: new")


def _preferred(origin: Origin, recorded: Iterable[str]) -> Iterator[Path]:
    """What goes before recorded files where it is there: `config.json` before params.json, one file before shards."""
    names = {"params.json": "config.json", "config.json": "model.safetensors"}
    match origin:
        case Adapter():
            yield from _preferred(origin.base, recorded)
        case Folder() | Hub():
            paths = (folder / names[name] for folder in folders(origin) for name in recorded if name in names)
            yield from (path for path in paths if path.is_file())


def _weight_files(origin: Origin, name: str) -> Iterator[Path]:
    """Paths at which a weight file of that name may be."""
    match origin:
        case Adapter():
            yield from _weight_files(origin.adapter, name)
            yield from _weight_files(origin.base, name)
        case File() | Package():
            if origin.path.name == name:
                yield origin.path
        case Folder() | Hub():
            yield from (folder / name for folder in folders(origin))


def tokenizer_of(origin: Origin) -> tuple[Path, ...]:
    """The files that the tokenizer is read from."""
    match origin:
        case Adapter():
            return adapted_tokenizer_files(origin.adapter.path, tokenizer_of(origin.base))
        case Folder() | Hub():
            return tuple(path for folder in folders(origin) for path in tokenizer_files(folder))
        case File() | Package() | Seed():
            return ()


def folders(origin: Folder | Hub) -> Iterator[Path]:
    """The folder; for a hub model the one in the hub's cache, if it is there. Nothing is downloaded."""
    if isinstance(origin, Folder):
        yield origin.path
        return
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(origin.repo, "config.json", revision=origin.revision)
    if isinstance(cached, str):
        yield Path(cached).parent


def _changed_texts(recorded: dict[str, str]) -> Iterator[str]:
    """Calibration texts that are gone or different."""
    for name, digest in recorded.items():
        path = found(CONFIGS / "calibration", name)
        if not path.is_file() or manifest.file_info(path).sha256 != digest:
            yield f"configs/calibration/{name}: changed"
