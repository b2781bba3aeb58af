"""Typed access to the key-value part of a GGUF file; a missing or wrong value is one line that names its key."""

from pathlib import Path
from typing import Any, TypeVar

from ..errors import ExportError

Value = TypeVar("Value", int, float, str, bool)


class Metadata:
    """The keys of one opened file."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self._reader = reader

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """One value; without a default the key must be there."""
        value = self._contents(key)
        if value is None and default is not None:
            return default
        self._require(key, value, kind)
        found: Value = value
        return found

    def texts(self, key: str) -> list[str]:
        """An array of strings."""
        return [self._require(key, item, str) for item in self._array(key)]

    def numbers(self, key: str) -> list[int]:
        """An array of integers."""
        return [self._require(key, item, int) for item in self._array(key)]

    def _array(self, key: str) -> list[Any]:
        values = self._contents(key)
        return list(self._require(key, values, list))

    def _contents(self, key: str) -> Any:
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError) as error:  # not UTF-8; no items
            raise ExportError(f"{self.path}: metadata key {key} is damaged ({error})") from None

    def _require(self, key: str, value: Any, kind: type) -> Any:
        if value is None:
            raise ExportError(f"{self.path}: metadata key {key} is missing")
        if type(value) is not kind:
            raise ExportError(f"{self.path}: metadata key {key} is {value!r:.60}, expected {kind.__name__}")
        return value
