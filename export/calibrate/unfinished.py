"""What a calibrated run has found so far, so that an interrupted one goes on. Knows no models."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..rounding import Rounded
from .sensitivity import Sensitivity

SENSITIVITIES, WINDOWS = "sensitivities.json", "windows.safetensors"


class Unfinished:
    """A folder with one file for each tensor, each written whole or not at all; it exists while the run does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, promoted: Iterable[str]) -> "Unfinished":
        """The folder inside it for one choice of promoted linears: another choice gives other integers."""
        return Unfinished(self.folder / hashlib.sha256("\n".join(promoted).encode()).hexdigest()[:16])

    def read(self, name: str) -> Rounded | None:
        """The integers of a tensor that an earlier run has rounded."""
        found = tensors(self._path(name))
        if found is None:
            return None
        signal, noise, largest = found["errors"].tolist()
        return Rounded(found["qdata"], found["scale"], signal, noise, largest)

    def keep(self, name: str, rounded: Rounded) -> None:
        """Write one tensor."""
        errors = torch.tensor([rounded.signal, rounded.noise, rounded.max_abs_error], dtype=torch.float64)
        self._write(self._path(name), {"qdata": rounded.qdata, "scale": rounded.scale, "errors": errors})

    def read_windows(self) -> torch.Tensor | None:
        """Text that the model wrote in an earlier run, token ids int64 [W, L]."""
        found = tensors(self.folder / WINDOWS)
        return found["ids"] if found else None

    def keep_windows(self, ids: torch.Tensor) -> None:
        """Write them."""
        self._write(self.folder / WINDOWS, {"ids": ids})

    def read_sensitivities(self) -> dict[str, Sensitivity] | None:
        """All of them, when an earlier run has finished measuring."""
        path = self.folder / SENSITIVITIES
        try:
            fields = json.loads(path.read_bytes())
            return {name: Sensitivity(*pair) for name, pair in fields.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None  # not there, or damaged: measured again

    def keep_sensitivities(self, found: dict[str, Sensitivity]) -> None:
        """Write all of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{SENSITIVITIES}.part"
        part.write_text(json.dumps({name: [one.kl, one.promoted_kl] for name, one in found.items()}))
        part.replace(self.folder / SENSITIVITIES)

    def remove(self) -> None:
        """The run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, path: Path, found: dict[str, torch.Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(found, part)
        part.replace(path)


def tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """What a file holds; None: it is not there, or damaged, and computing it again costs less than a question."""
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError:
        return None
