"""Whether an artifact folder holds what a build would write again. Imports no torch: an unchanged build ends at once.

Compared are the resolved plan, the bytes of the checkpoint and of the calibration texts, our code, the versions of the
tools, and the artifact's own files. Whatever cannot be told this way counts as changed.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import manifest
from .errors import ExportError
from .manifest import Manifest
from .places import ADAPTER, HUB, locate, origin_of, split_adapter
from .plan import CONFIGS, Plan


def reasons(plan: Plan, source: str | None, folder: Path) -> list[str]:
    """Why a build of `plan` into `folder` would write something else, a line each; empty: it would not."""
    if not (folder / manifest.FILE).is_file():
        return ["not built yet"]
    try:
        built = manifest.read(folder)
        asked = [*changed_plan(built.plan, plan), *changed_inputs(built, plan, source)]
        if not asked:
            manifest.verify_files(folder, built)
    except ExportError as error:
        return [str(error).partition("; build")[0]]
    return asked


def changed_plan(built: Plan, wanted: Plan) -> Iterator[str]:
    """`quant.linear.group_size: 32, was 64`."""
    was, now = leaves(built.model_dump()), leaves(wanted.model_dump())
    for name in was | now:
        if was.get(name) != now.get(name):
            yield f"{name}: {now.get(name)}, was {was.get(name)}"


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every plain value of nested records under its dotted name."""
    if not isinstance(value, dict | list | tuple) or not value:
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= leaves(inner, f"{name}.{key}" if name else str(key))
    return found


def changed_inputs(built: Manifest, plan: Plan, source: str | None) -> Iterator[str]:
    """Weights, texts, tools and code."""
    origin = origin_of(plan.model, source)
    if built.checkpoint.origin != origin:
        yield f"checkpoint: {origin}, was {built.checkpoint.origin}"
    else:
        yield from changed_files(built.checkpoint.sha256, origin)
    if built.quantization.calibration is not None:
        yield from changed_texts(built.quantization.calibration.texts)
    for tool, version in manifest.tool_versions().items():
        if (was := built.tools.get(tool)) != version:
            yield f"{tool}: {version}, was {was}"
    if manifest.source_sha256() != built.source.sha256:
        yield f"export/: changed since commit {built.source.commit[:12]}{' with local changes' * built.source.dirty}"


def changed_files(recorded: dict[str, str], origin: str) -> Iterator[str]:
    """Files of the checkpoint that are gone or other."""
    if origin.startswith("seed:"):
        return
    for name, digest in recorded.items():
        found = [path for path in files_of(origin, name) if path.is_file()]
        if not found:
            yield f"{name}: not found in {origin}"
        elif all(remembered_sha256(path) != digest for path in found):
            yield f"{found[0]}: changed"


def files_of(origin: str, name: str) -> Iterator[Path]:
    """Where a file of that name may lie; of a hub model in the hub's cache, the network is not asked."""
    if origin.startswith(ADAPTER):
        for part in split_adapter(origin):
            yield from files_of(part, name)
    elif isinstance(place := locate(origin), Path):
        if place.is_dir() or place.name == name:
            yield place if place.is_file() else place / name
    elif place.startswith(HUB):
        from huggingface_hub import try_to_load_from_cache

        repo, _, revision = place.removeprefix(HUB).partition("@")
        cached = try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(cached, str):
            yield Path(cached)


def remembered_sha256(path: Path) -> str:
    """A file's digest, kept in the cache for as long as its size and time of change stay the same."""
    state = path.stat()
    stamp = f"{path.resolve()}|{state.st_ino}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}"
    note = manifest.ROOT / "build" / "digests" / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    try:
        remembered: str = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        remembered = manifest.file_info(path).sha256
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(remembered), encoding="utf-8")
    return remembered


def changed_texts(recorded: dict[str, str]) -> Iterator[str]:
    """Calibration texts of this checkout; a hub's carry their revision in their names."""
    for name, digest in recorded.items():
        path = CONFIGS / "calibration" / name
        if not name.startswith("hub:") and (not path.is_file() or manifest.file_info(path).sha256 != digest):
            yield f"configs/calibration/{name}: changed"
