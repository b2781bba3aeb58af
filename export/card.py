"""The model card. Placeholder until the measured table is written (see runtime_tests)."""

from collections.abc import Sequence
from pathlib import Path

from .manifest import CARD, Manifest


def write(folder: Path, manifest: Manifest, measured: Sequence[object]) -> None:
    """Write `README.md`."""
    (folder / CARD).write_text(f"# {manifest.id}\n", encoding="utf-8")
