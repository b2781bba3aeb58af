"""Classes that libraries generated from the schemas of their file formats, without the rest of these libraries.

A folder is judged before any of its files is used; importing coremltools for that would take longer than all else.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from export.errors import ExportError

_LARGEST_BYTES = 2**24
"""Of a graph without its weights; Llama 3.2's take less than a megabyte."""


def module(package: str, folder: str, name: str) -> Any:
    """A generated module in a folder of an installed package, whose own code is not run. Raises ExportError: no such.

    protobuf keeps one registry, so that the library may be imported before or after.
    """
    parent = f"_{package}_schema"
    if parent not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ExportError(f"package {package!r} is not installed: run `make setup`")
        made = ModuleType(parent)
        made.__path__ = [str(Path(place) / folder) for place in spec.submodule_search_locations]
        sys.modules[parent] = made
    return importlib.import_module(f"{parent}.{name}")


def read(path: Path) -> bytes:
    """A graph's file, which is small. Raises ExportError: it is not."""
    if path.stat().st_size > _LARGEST_BYTES:
        raise ExportError(f"{path}: larger than {_LARGEST_BYTES} bytes, which no graph of ours is; build it again")
    return path.read_bytes()


def parsed(message: Any, path: Path) -> Any:
    """A graph's file as a protobuf message, all of it.

    Raises ExportError: it holds fields that the schema does not have, or one twice; a runtime of another version may
    read them.
    """
    data = read(path)
    message.ParseFromString(data)
    message.DiscardUnknownFields()
    if message.ByteSize() != len(data):
        raise ExportError(f"{path}: holds fields that no build writes; refused")
    return message


def fields(message: Any) -> set[str]:
    """Names of the fields that are set in a protobuf message."""
    return {descriptor.name for descriptor, _ in message.ListFields()}
