"""Where a checkpoint is: the words a user gives, and the file or folder they mean. Reads nothing, imports no torch."""

import os
from pathlib import Path

from .errors import ExportError
from .plan import ModelSpec

HUB = "hub:"
ADAPTER = "adapter:"
"""`adapter:FOLDER//SPEC` is the checkpoint SPEC with the LoRA adapter in FOLDER merged; no path holds `//`."""


def adapted(spec: str, adapter: Path) -> str:
    """The spec of a checkpoint with an adapter."""
    return f"{ADAPTER}{Path(os.path.expanduser(adapter)).resolve()}//{spec}"  # noqa: PTH111  (see `locate`)


def split_adapter(spec: str) -> tuple[str, str]:
    """`adapter:FOLDER//SPEC` → FOLDER and SPEC."""
    folder, separator, base = spec.removeprefix(ADAPTER).partition("//")
    if not (folder and separator):
        raise ExportError(f"{spec}: expected adapter:FOLDER//CHECKPOINT")
    if base.startswith((ADAPTER, "seed:")):
        raise ExportError(f"{spec}: an adapter is merged into a checkpoint, not into {base.partition(':')[0]}:…")
    return folder, base


def locate(spec: str) -> Path | str:
    """A `source` string of a model YAML or of --source: a local path, or a `hub:`/`seed:`/`adapter:` string."""
    if spec.startswith(ADAPTER):
        folder, base = split_adapter(spec)
        return f"{ADAPTER}{locate(folder)}//{locate(base)}"
    if spec.startswith("package:"):
        return package_file(spec.removeprefix("package:"))
    if spec.startswith(("hub:", "seed:")):
        return spec
    if not spec:
        raise ExportError("--source is empty; give a folder, a .gguf file or a hub id")
    path = Path(os.path.expanduser(spec))  # noqa: PTH111  (Path's own raises for an unknown user)
    if path.exists():
        return path.resolve()
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
        return f"hub:{spec}"
    raise ExportError(f"{spec}: no such file or folder (and not a hub id like owner/name)")


def package_file(spec: str) -> Path:
    """`NAME/FILE` → the file inside an installed Python package, found without importing it."""
    import importlib.util

    package, _, file = spec.partition("/")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # `a.b` without `a`; an empty name
        found = None
    if found is None or not found.submodule_search_locations:
        raise ExportError(f"package {package!r} is not installed: run `make setup`, or give --source")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ExportError(f"{path}: missing; reinstall the package {package!r}")
    return path


def origin_of(model: ModelSpec, source: str | None) -> str:
    """Where the weights come from: `source`, or the model's own."""
    origin = model.source if source is None else source
    if origin is None:
        raise ExportError(f"model {model.name!r} has no weights of its own: give --source DIR")
    return origin
