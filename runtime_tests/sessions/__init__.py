"""Sessions: an artifact opened in its runtime. Each runtime has a module, found by the name in the target's YAML."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from export.errors import ExportError, suggestion
from export.manifest import Manifest

from .base import Session

__all__ = ["Session", "names", "open_session", "session_module"]
_SHARED = {"base", "board", "footprint", "saved", "timing", "trace"}
"""Modules of this room that are no session."""


class _SessionModule(Protocol):
    RUNTIME: str
    """The name of what runs an artifact, for people."""

    def runtime_calls(self) -> list[tuple[type[Any], str]]:
        """Class and method of every call that passes work to the runtime."""

    def open_session(self, folder: Path, manifest: Manifest, *, threads: int) -> Session:
        """Load the artifact of a folder."""


def names() -> list[str]:
    """Names of all sessions, sorted."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - _SHARED)


def require(name: str) -> str:
    """The name of a session. Raises ExportError for any other: what a manifest names is not imported."""
    if name not in names():
        raise ExportError(f"unknown session {name!r} in the artifact's target; {suggestion(name, names())}")
    return name


def session_module(manifest: Manifest) -> _SessionModule:
    """The module that the artifact's target names; importing it imports its runtime. Raises ExportError."""
    return cast(_SessionModule, importlib.import_module(f"{__name__}.{require(manifest.plan.target.session)}"))


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> Session:
    """Load an artifact in the runtime that its target names. Raises whatever the runtime raises."""
    return session_module(manifest).open_session(folder, manifest, threads=threads)


def greedy(
    session: Session, prompt: Sequence[int], most: int, ended: Callable[[Sequence[int]], bool] = lambda _: False
) -> list[int]:
    """The most likely tokens after a prompt: `most` of them, or up to the first one after which `ended` holds."""
    tokens = [int(session.prefill(prompt).argmax())]
    while len(tokens) < most and not ended(tokens):
        tokens.append(int(session.feed(tokens[-1:]).argmax()))
    return tokens
