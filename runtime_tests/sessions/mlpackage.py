"""Core ML sessions: the real runtime on a Mac, the evaluator of the saved package elsewhere. Knows no tokenizer."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.manifest import Manifest

Floats = NDArray[np.floating[Any]]
MASKED = np.float16(-65504)
PIECE = 512
"""Most tokens per call: the package returns logits of every position, [tokens, vocabulary]."""


class CoreML:
    """Core ML itself; macOS 15 or later."""

    measures_speed = True

    def __init__(self, package: Path) -> None:
        import coremltools as ct

        self.model: Any = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit.CPU_AND_GPU)
        self.state: Any = self.model.make_state()

    def reset(self) -> None:
        self.state = self.model.make_state()

    def predict(self, ids: NDArray[np.int32], mask: NDArray[np.float16]) -> Floats:
        """ids [1, q], mask [1, 1, q, e] → logits [q, V], in the package's own precision."""
        result = self.model.predict({"inputIds": ids, "causalMask": mask}, state=self.state)
        logits: Floats = np.asarray(result["logits"])[0]
        return logits


class Reference:
    """The evaluator: correctness only."""

    measures_speed = False

    def __init__(self, package: Path, threads: int) -> None:
        from ..mil_evaluator import Evaluator

        self.threads = threads
        torch.set_num_threads(1)
        self.evaluator = Evaluator(package)

    def reset(self) -> None:
        self.evaluator.reset()

    def predict(self, ids: NDArray[np.int32], mask: NDArray[np.float16]) -> Floats:
        # one row is bound by memory; on a busy machine the barriers of two threads cost ten times the work itself
        torch.set_num_threads(1 if ids.shape[1] == 1 else self.threads)
        result = self.evaluator.predict({"inputIds": torch.from_numpy(ids), "causalMask": torch.from_numpy(mask)})
        logits: Floats = result["logits"][0].numpy()
        return logits


class PackageSession:
    """A `.mlpackage` behind the session protocol."""

    def __init__(self, runtime: CoreML | Reference, context_length: int, max_prefill: int) -> None:
        self.runtime: CoreML | Reference | None = runtime
        self.context_length = context_length
        self.piece = min(max_prefill, PIECE)
        self.position = 0
        self.measures_speed = runtime.measures_speed

    def reset(self) -> None:
        assert self.runtime is not None, "the session is closed"
        self.runtime.reset()
        self.position = 0

    def rewind(self, length: int) -> None:
        self.position = length  # the mask hides what was written after it

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        for logits in self.pieces(tokens):
            last: Floats = logits[-1]
        return last.astype(np.float32)

    def feed_each(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = np.concatenate(list(self.pieces(tokens)), dtype=np.float32)
        return logits

    def pieces(self, tokens: Sequence[int]) -> Iterator[Floats]:
        """Logits [q, V] of one call after the other."""
        assert self.runtime is not None, "the session is closed"
        if not tokens:
            raise ValueError("feed needs at least one token")
        if self.position + len(tokens) > self.context_length:
            raise ValueError(f"{self.position} + {len(tokens)} tokens exceed the context of {self.context_length}")
        for first in range(0, len(tokens), self.piece):
            ids = np.array([tokens[first : first + self.piece]], np.int32)
            logits = self.runtime.predict(ids, causal_mask(self.position, ids.shape[1]))
            self.position += ids.shape[1]
            yield logits

    def close(self) -> None:
        self.runtime = None


def causal_mask(past: int, new: int) -> NDArray[np.float16]:
    """0 for slots a new token may see, fp16's lowest for later ones: [1, 1, new, past + new]."""
    hidden = np.triu(np.ones((new, past + new), bool), k=past + 1)
    return np.where(hidden, MASKED, np.float16(0))[None, None]


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> PackageSession:
    """Load the package of an artifact folder."""
    package = folder / manifest.plan.target.artifact
    runtime = CoreML(package) if sys.platform == "darwin" else Reference(package, threads)
    return PackageSession(runtime, manifest.contract.kv.context_length, manifest.contract.max_prefill)
