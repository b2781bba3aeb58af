"""The runner for ONNX artifacts on Linux boards: docs/runner.md over onnxruntime. Goes to the device.

Needs Python 3.9, numpy and onnxruntime; the context length is in the genai_config.json beside the model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .protocol import main

PIECE = 256
"""Most tokens per run: where logits come for every position, 256 × 128,256 of them are 131 MB."""


class Session:
    """One model; every cache buffer is bound as past and as present, so a step copies nothing but its own part."""

    def __init__(self, model: Path, threads: int | None) -> None:
        decoder = json.loads((model.parent / "genai_config.json").read_text())["model"]
        self.context_length, self.vocab_size = decoder["context_length"], decoder["vocab_size"]
        self.threads = threads or os.cpu_count() or 1
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        for name, value in decoder["decoder"]["session_options"].items():
            if name.startswith("session."):
                options.add_session_config_entry(name, value)
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.cache = []
        caches = [entry for entry in self.session.get_inputs() if entry.name.startswith("past_key_values.")]
        for entry in caches:
            _, heads, _, dim = entry.shape
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, self.context_length, dim), np.float32))
            self.binding.bind_ortvalue_input(entry.name, buffer)
            self.binding.bind_ortvalue_output(entry.name.replace("past_key_values", "present"), buffer)
            self.cache.append(buffer)
        (logits,) = (entry for entry in self.session.get_outputs() if entry.name == "logits")
        self.last_only = logits.shape[1] == 1
        """Whether the graph yields the logits of the last position, or of every one."""
        self.logits = np.empty((1, 1, self.vocab_size), np.float32)
        self.mask = np.ones((1, self.context_length), np.int64)
        self.length = 0

    def reset(self) -> None:
        self.length = 0

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        for start in range(0, len(tokens), PIECE):
            last = self.run(np.array([tokens[start : start + PIECE]], np.int64))
        return last

    def run(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """One call with tokens [1, S]; logits [V] of the last."""
        new = tokens.shape[1]
        logits = self.logits if self.last_only or new == 1 else np.empty((1, new, self.vocab_size), np.float32)
        self.binding.bind_cpu_input("input_ids", tokens)
        self.binding.bind_cpu_input("attention_mask", self.mask[:, : self.length + new])
        self.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(self.binding)
        self.length += new
        last: NDArray[np.float32] = logits[0, -1].copy()
        return last


if __name__ == "__main__":
    sys.exit(main("onnx", f"onnxruntime {ort.__version__}", Session))
