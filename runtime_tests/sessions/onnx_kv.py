"""ONNX artifacts in onnxruntime. Copied to Linux boards as a runner: needs only Python 3.9, numpy and onnxruntime."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # its mere import would write an id of this device and call Microsoft
import onnxruntime as ort

from .base import CacheError, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.manifest import IOContract, Manifest

PIECE = 256
"""Most tokens per call: logits of every position are 256 × 128,256 × 4 bytes = 131 MB."""

RUNTIME = "our session, onnxruntime with IO binding"


class OnnxSession(Session):
    """One model. Every cache buffer is bound both as past and as present, so a step writes only its own slots.

    With a window of W tokens in C slots, the first of them hold the newest tokens in order. Where a token finds no
    slot, GroupQueryAttention removes C - W + 1 at once.
    """

    def __init__(self, model: Path, contract: IOContract, threads: int) -> None:
        kv = contract.kv
        vocab_size = int(contract.outputs[0].shape[-1])
        super().__init__(kv.context_length, min(contract.max_prefill, PIECE), contract.logits, vocab_size)
        self.keep(kv)
        self.runtime = ort.InferenceSession(str(model), options_of(model, threads), providers=["CPUExecutionProvider"])
        self.binding = self.runtime.io_binding()
        self.ids, self.mask, *pasts = (spec.name for spec in contract.inputs)
        self.output, *presents = (spec.name for spec in contract.outputs)
        self.caches: dict[str, NDArray[Any]] = {}
        for past, present in zip(pasts, presents):  # noqa: B905 – Python 3.9
            self.caches[past] = np.zeros((1, kv.kv_heads, self.room, kv.head_dim), kv.dtype)
            buffer = ort.OrtValue.ortvalue_from_numpy(self.caches[past])  # the same memory
            self.binding.bind_ortvalue_input(past, buffer)
            self.binding.bind_ortvalue_output(present, buffer)
        self.row = np.empty((1, 1, vocab_size), np.float32)
        self.visible = np.ones((1, kv.context_length), np.int64)

    def step(self, tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        new = len(tokens)
        one_row = self.logits == "last" or new == 1
        logits = self.row if one_row else np.empty((1, new, self.row.shape[-1]), np.float32)
        self.binding.bind_cpu_input(self.ids, np.array([tokens], np.int64))
        self.binding.bind_cpu_input(self.mask, self.visible[:, : position + new])
        self.binding.bind_output(self.output, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.oldest = max(self.oldest, self._first(position + new))  # even where the call fails half-way
        self.runtime.run_with_iobinding(self.binding)
        rows: NDArray[np.float32] = logits[0]
        return rows

    def _first(self, total: int) -> int:
        """Position of the token in slot 0 after so many tokens."""
        if total <= self.room:
            return 0
        leave = self.room - self.window + 1
        return -(-(total - self.room) // leave) * leave

    def rewind(self, length: int) -> None:
        """Move what is left to the slots in which GroupQueryAttention expects it; those before it are out of sight."""
        before = self.position
        super().rewind(length)
        if moved := self._first(before) - self._first(length):
            for cache in self.caches.values():
                cache[:, :, moved:] = cache[:, :, :-moved].copy()

    def buffers(self) -> dict[str, NDArray[Any]]:
        if self.room < self.context_length:
            raise CacheError("tokens move in the KV cache of a window, and none has a slot of its own")
        return {name: np.moveaxis(slots, 2, 0) for name, slots in self.caches.items()}


def options_of(model: Path, threads: int) -> ort.SessionOptions:
    """The session options that genai_config.json gives every client."""
    decoder = json.loads((model.parent / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in decoder["session_options"].items():
        if name.startswith("session."):
            options.add_session_config_entry(name, value)
    options.log_severity_level = 3
    return options


def runtime_calls() -> list[tuple[type[Any], str]]:
    """The two ways to run a model."""
    return [(ort.InferenceSession, "run"), (ort.InferenceSession, "run_with_iobinding")]


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> OnnxSession:
    """Load the artifact of a folder. Raises onnxruntime's errors."""
    return OnnxSession(folder / manifest.plan.target.artifact, manifest.contract, threads)


if __name__ == "__main__":
    from .board import main

    sys.exit(main("onnx", f"onnxruntime {ort.__version__}", OnnxSession))
