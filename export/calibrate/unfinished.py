"""What a calibrated run has rounded so far, so that an interrupted one goes on. Knows no models."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..rounding import Rounded


class Unfinished:
    """A folder with one file for each tensor, each written whole or not at all; it exists while the run does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> Rounded | None:
        """The integers of a tensor that an earlier run has rounded."""
        path = self._path(name)
        try:
            found = load_file(path) if path.is_file() else None
        except SafetensorError:
            return None  # not ours, or damaged: rounding it again costs seconds
        if found is None:
            return None
        signal, noise, largest = found["errors"].tolist()
        return Rounded(found["qdata"], found["scale"], signal, noise, largest)

    def keep(self, name: str, rounded: Rounded) -> None:
        """Write one tensor."""
        import torch

        self.folder.mkdir(exist_ok=True)
        errors = torch.tensor([rounded.signal, rounded.noise, rounded.max_abs_error], dtype=torch.float64)
        part = self._path(name).with_suffix(".part")
        save_file({"qdata": rounded.qdata, "scale": rounded.scale, "errors": errors}, part)
        part.replace(self._path(name))

    def remove(self) -> None:
        """The run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
