"""Core ML packages: in Core ML on a Mac, in our evaluator of the saved package elsewhere.

Copied to Macs as a runner, where it needs only Python 3.9, numpy and coremltools; `Evaluated` is not used there.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.manifest import IOContract, Manifest

_FIRST_WITH_STATE = 15
"""macOS; earlier ones have no KV-cache state."""


def in_core_ml() -> bool:
    """Whether packages run in Core ML here; `LLAMA_COREML=reference` chooses the evaluator on a Mac too."""
    if platform.system() != "Darwin" or os.environ.get("LLAMA_COREML") == "reference":
        return False
    return int(platform.mac_ver()[0].partition(".")[0] or 0) >= _FIRST_WITH_STATE


RUNTIME = "Core ML" if in_core_ml() else "our evaluator of the saved package"
PIECE = 512
"""Most tokens per call: the package returns logits of every position, 512 × 128,256 × 2 bytes = 131 MB."""


class PackageSession(Session):
    """One package and one state; `model` has Core ML's `make_state` and `predict`."""

    compiled: tempfile.TemporaryDirectory[str] | None = None
    """Goes with the session."""

    def __init__(self, model: Any, contract: IOContract, *, measures_speed: bool) -> None:
        vocab_size = int(contract.outputs[0].shape[-1])
        super().__init__(contract.kv.context_length, min(contract.max_prefill, PIECE), contract.logits, vocab_size)
        self.measures_speed = measures_speed
        self.ids, self.mask = (spec.name for spec in contract.inputs)
        self.output = contract.outputs[0].name
        self.model = model
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.state = self.model.make_state()

    def step(self, tokens: Sequence[int], position: int) -> NDArray[np.floating[Any]]:
        inputs = {self.ids: np.array([tokens], np.int32), self.mask: _causal_mask(position, len(tokens))}
        logits: NDArray[np.floating[Any]] = np.asarray(self.model.predict(inputs, state=self.state)[self.output])[0]
        return logits


def _causal_mask(past: int, new: int) -> NDArray[np.float16]:
    """0 for the slots that a new token may attend to, fp16's lowest number for later ones: [1, 1, new, past + new].

    The program reads as many slots of the cache as the mask is wide.
    """
    hidden = np.triu(np.ones((new, past + new), bool), k=past + 1)
    return np.where(hidden, np.float16(-65504), np.float16(0))[None, None]


class Evaluated:
    """The evaluator of the saved package with the interface of a Core ML model; its speed means nothing."""

    def __init__(self, package: Path, threads: int) -> None:
        import torch

        from runtime_tests.coreml.evaluator import Evaluator

        self.torch, self.threads = torch, threads
        torch.set_num_threads(1)
        self.evaluator = Evaluator(package)

    def make_state(self) -> dict[str, Any]:
        self.evaluator.reset()
        return self.evaluator.states

    def predict(self, inputs: dict[str, NDArray[Any]], state: dict[str, Any]) -> dict[str, NDArray[Any]]:
        self.evaluator.states = state
        ids, _mask = inputs.values()
        # one row is bound by memory: on a busy machine the barriers of two threads cost ten times the work itself
        self.torch.set_num_threads(1 if ids.size == 1 else self.threads)
        outputs = self.evaluator.predict({name: self.torch.from_numpy(values) for name, values in inputs.items()})
        return {name: values.numpy() for name, values in outputs.items()}


def _core_ml(package: Path, contract: IOContract, _threads: int) -> PackageSession:
    """Needs macOS 15. Core ML chooses its number of threads itself.

    Compiled first: an MLModel of a package that Core ML refuses loads without it and keeps the reason to itself.
    """
    import coremltools as ct

    folder = tempfile.TemporaryDirectory()
    compiled = ct.models.utils.compile_model(str(package), f"{folder.name}/{package.stem}.mlmodelc")
    model = ct.models.CompiledMLModel(compiled, compute_units=ct.ComputeUnit.CPU_AND_GPU)
    session = PackageSession(model, contract, measures_speed=True)
    session.compiled = folder
    return session


def runtime_calls() -> list[tuple[type[Any], str]]:
    """The prediction of Core ML or of the evaluator."""
    if in_core_ml():
        from coremltools.models import CompiledMLModel

        return [(CompiledMLModel, "predict")]
    from runtime_tests.coreml.evaluator import Evaluator

    return [(Evaluator, "predict")]


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> PackageSession:
    """Load the package of an artifact folder."""
    package = folder / manifest.plan.target.artifact
    if in_core_ml():
        return _core_ml(package, manifest.contract, threads)
    return PackageSession(Evaluated(package, threads), manifest.contract, measures_speed=False)


if __name__ == "__main__":
    from coremltools import __version__

    from .board import main

    sys.exit(main("coreml", f"Core ML through coremltools {__version__}", _core_ml))
