"""The texts that a recipe calibrates with, in `configs/calibration`. Knows nothing about models."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError
from ..plan import CONFIGS, Mixture
from ..windows import cut

TEXT = CONFIGS / "calibration"


def windows(mixture: Mixture, tokenizer: Any) -> torch.Tensor:
    """Token ids int64 [W, L] of all texts."""
    rows: list[list[int]] = []
    for text in mixture.texts:
        rows += cut(read(text.file), f"calibration text {text.file}", text.windows, mixture.length, tokenizer)
    return torch.tensor(rows)


def read(name: str) -> str:
    """One text."""
    path: Path = TEXT / name
    if not path.is_file():
        raise ExportError(f"{path}: missing; a mixture in configs/mixtures names it")
    return path.read_text(encoding="utf-8")


def sha256(mixture: Mixture | None) -> dict[str, str]:
    """File → digest of every text: what was read decides the integers."""
    texts = mixture.texts if mixture else ()
    return {text.file: hashlib.sha256(read(text.file).encode()).hexdigest() for text in texts}
