"""Where the checkpoint of an artifact is on this machine. A manifest tells no path; builds leave it here."""

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256 as hashed
from pathlib import Path

from export.errors import ExportError
from export.host import disk
from export.manifest import ROOT, CheckpointInfo
from export.plan import ModelSpec, load_named, names, not_a_file_name

from .origin import (
    Adapter,
    Folder,
    Hub,
    Origin,
    Package,
    Seed,
    absolute,
    halves,
    is_private,
    parse_origin,
    published,
)

FOLDER = ROOT / "build" / "origins"
"""One file for each checkpoint, named by its digests: the places that it was built from, newest last, as JSON."""
_REMEDY = "nothing is downloaded or run on its word; give the checkpoint with --source"
_MOST_PLACES = 8


def remember(origin: Origin, sha256: Mapping[str, str]) -> None:
    """Note where a checkpoint of these digests was built from, unless a manifest tells that itself."""
    if not is_private(published(origin)):
        return
    place = [absolute(origin), str(origin)]
    others = [known for known in _places(sha256) if known[0] != place[0]]
    folder = disk.writable_folder(FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    disk.write_text(folder / _file(sha256), json.dumps([*others, place][-_MOST_PLACES:], indent=1) + "\n")


def _file(sha256: Mapping[str, str]) -> str:
    return f"{hashed(json.dumps(sorted(sha256.items())).encode()).hexdigest()[:32]}.json"


def _places(sha256: Mapping[str, str]) -> list[list[str]]:
    """The text that means the same in every folder and the text that was given, of each place; empty: none is known."""
    try:
        known = json.loads((disk.writable_folder(FOLDER) / _file(sha256)).read_text(encoding="utf-8"))
        return [[str(absolute), str(given)] for absolute, given in known]
    except (OSError, ValueError, TypeError, ExportError):
        return []


def origins(checkpoint: CheckpointInfo) -> Iterator[Origin]:
    """Where an artifact's checkpoint was built from, newest first, then what its manifest tells.

    Places where nothing is any more are left out; at the others the bytes may have changed.
    """
    for text in [place[0] for place in reversed(_places(checkpoint.sha256))] + [checkpoint.origin]:
        with suppress(ExportError):
            yield parse_origin(text)


def given(checkpoint: CheckpointInfo) -> str | None:
    """The first of these as it was given, where that still means the same; None: no place is known.

    Where none is there any more, the last that was.
    """
    places = _places(checkpoint.sha256)
    origin = next(origins(checkpoint), None)
    for _, text in places:
        with suppress(ExportError):
            if parse_origin(text) == origin:
                return text
    if origin is not None:
        return str(origin)
    return places[-1][0] if places else None


def place(checkpoint: CheckpointInfo) -> str | None:
    """For a job in a process of its own: where a checkpoint still is that was built from a place of this machine."""
    there = next(origins(checkpoint), None) if _places(checkpoint.sha256) else None
    return None if there is None else absolute(there)


def told(checkpoint: CheckpointInfo, source: str | None) -> Origin:
    """The origin of the checkpoint that an artifact is compared with: `source`, or where it was built from.

    Raises ExportError: the checkpoint has moved, or the manifest leads elsewhere.
    """
    if source is not None:
        return parse_origin(source)
    if (text := place(checkpoint)) is not None:
        return parse_origin(text)
    places = _places(checkpoint.sha256)
    return followed(places[-1][0] if places else checkpoint.origin)


def followed(text: str) -> Origin:
    """What a manifest tells of an origin, on this machine.

    Its word is followed to what is here already, and nothing is downloaded: a seed, a file of a package that
    configs/models names, a hub model in the hub's cache, a path. Raises ExportError: it leads elsewhere.
    """
    if missing := gone(text):
        adapter, base = halves(text)
        options = {"--source": base, "--adapter": adapter}
        now = [
            f"{option} {option.strip('-').upper() if part in missing else shlex.quote(part)}"
            for option, part in options.items()
            if part
        ]
        raise ExportError(
            f"{' and '.join(missing)}: not found on this machine; give where it is now with {' '.join(now)}"
        )
    return _here(parse_origin(text))


def gone(text: str) -> list[str]:
    """The adapter of an origin, its base, or both, where nothing is there any more."""
    return [part for part in halves(text) if part and not _is_there(part)]


def _is_there(text: str) -> bool:
    with suppress(ExportError):
        return bool(parse_origin(text))
    return False


def _here(origin: Origin) -> Origin:
    match origin:
        case Adapter():
            base = _here(origin.base)
            assert not isinstance(base, Adapter | Seed)  # what a checkpoint is found at is no other kind
            return replace(origin, base=base)
        case Package() if origin not in _own_packages():
            raise ExportError(f"{origin}: told by the artifact, and no model of configs/models has it: {_REMEDY}")
        case Hub():
            return _cached(origin)
        case _:
            return origin


def _own_packages() -> Iterator[Origin]:
    """Those of packages among the places where the models of configs/models come from."""
    for name in names("models"):
        with suppress(ExportError):  # a path that is not here
            if (source := load_named(ModelSpec, "models", name).source) is not None:
                yield parse_origin(source)


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
