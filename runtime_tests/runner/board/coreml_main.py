"""The runner for Core ML artifacts on a Mac: docs/runner.md over Core ML itself. Goes to the device.

Needs macOS 15, numpy and coremltools; shapes are in the manifest.json beside the package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from numpy.typing import NDArray

from .protocol import main

PIECE = 512
"""Most tokens per call: the package returns the logits of every position."""


class Session:
    """One package and one state."""

    def __init__(self, package: Path, threads: int | None) -> None:
        self.threads = threads or 1  # Core ML chooses its own; the protocol wants a number
        described = json.loads((package.parent / "manifest.json").read_text())
        self.context_length: int = described["contract"]["kv"]["context_length"]
        self.vocab_size: int = described["plan"]["model"]["architecture"]["vocab_size"]
        self.model: Any = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit.CPU_AND_GPU)
        self.reset()

    def reset(self) -> None:
        self.state: Any = self.model.make_state()
        self.position = 0

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        for start in range(0, len(tokens), PIECE):
            last = self.predict(np.array([tokens[start : start + PIECE]], np.int32))
        return last

    def predict(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """One call with ids [1, S]; logits [V] of the last."""
        new = ids.shape[1]
        hidden = np.triu(np.ones((new, self.position + new), bool), k=self.position + 1)
        mask = np.where(hidden, np.float16(-65504), np.float16(0))[None, None]
        result = self.model.predict({"inputIds": ids, "causalMask": mask}, state=self.state)
        self.position += new
        last: NDArray[np.float32] = np.asarray(result["logits"])[0, -1].astype(np.float32)
        return last


if __name__ == "__main__":
    sys.exit(main("coreml", f"Core ML through coremltools {ct.__version__}", Session))
