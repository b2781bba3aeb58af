"""JSON whose objects name each key once: of two values readers take different ones, and check what another uses."""

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """Raises ValueError: no JSON, or a key twice; RecursionError: nested too deep."""
    return json.loads(text, object_pairs_hook=once)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r:.80} is there twice")
        found[key] = value
    return found
