"""An onnx_kv artifact in onnxruntime, cache buffers bound once. Knows token ids, never text."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.contract import IOContract
from export.manifest import Manifest

PIECE = 256
"""Most tokens per run: logits come for every position, and 256 × 128,256 of them are 131 MB."""


class OnnxSession:
    """One model and one cache, its slots allocated for the whole context and written in place.

    The same buffer is bound as past and as present of a layer, so a step copies nothing but its own keys and values.
    """

    def __init__(self, model: Path, contract: IOContract, threads: int) -> None:
        self.contract = contract
        self.session = ort.InferenceSession(
            model, session_options(model.parent, threads), providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        self.cache = [self._bind_cache(i) for i in range(2 * contract.kv.layers)]
        self.mask = np.ones((1, contract.kv.context_length), np.int64)
        self.vocab_size = int(contract.outputs[0].shape[-1])
        self.logits = np.empty((1, 1, self.vocab_size), np.float32)
        self.length = 0

    @property
    def measures_speed(self) -> bool:
        return True

    def reset(self) -> None:
        self.length = 0

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if not tokens:
            raise ValueError("no tokens to feed")
        if self.length + len(tokens) > self.contract.kv.context_length:
            raise ValueError(
                f"{self.length} tokens in the cache and {len(tokens)} new ones are more than the context length "
                f"{self.contract.kv.context_length}"
            )
        piece = min(PIECE, self.contract.max_prefill)
        for start in range(0, len(tokens), piece):
            last = self._run(np.array([tokens[start : start + piece]], np.int64))
        return last

    def close(self) -> None:
        del self.binding, self.cache, self.session

    def _bind_cache(self, index: int) -> ort.OrtValue:
        """One layer's keys or values, [1, G, context, D], as input and output."""
        kv = self.contract.kv
        buffer = ort.OrtValue.ortvalue_from_numpy(
            np.zeros((1, kv.kv_heads, kv.context_length, kv.head_dim), np.dtype(kv.dtype))
        )
        self.binding.bind_ortvalue_input(self.contract.inputs[2 + index].name, buffer)
        self.binding.bind_ortvalue_output(self.contract.outputs[1 + index].name, buffer)
        return buffer

    def _run(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """One call with tokens [1, S]; logits [V] of the last."""
        new = tokens.shape[1]
        positions = new if self.contract.logits == "all" else 1
        logits = self.logits if positions == 1 else np.empty((1, positions, self.vocab_size), np.float32)
        self.binding.bind_cpu_input("input_ids", tokens)
        self.binding.bind_cpu_input("attention_mask", self.mask[:, : self.length + new])
        self.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(self.binding)
        self.length += new
        last: NDArray[np.float32] = logits[0, -1].copy()
        return last


def session_options(folder: Path, threads: int) -> ort.SessionOptions:
    """`threads` computing threads, and what else the artifact's genai_config.json asks of onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    config = json.loads((folder / "genai_config.json").read_bytes())
    for name, value in config["model"]["decoder"]["session_options"].items():
        if name.startswith("session."):
            options.add_session_config_entry(name, value)
    options.log_severity_level = 3
    return options


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> OnnxSession:
    """Load the artifact of a folder; a damaged file is onnxruntime's error."""
    return OnnxSession(folder / manifest.plan.target.artifact, manifest.contract, threads)
