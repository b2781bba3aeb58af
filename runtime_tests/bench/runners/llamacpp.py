"""A GGUF in llama.cpp by its C functions, through llama-cpp-python's bindings; none of its Python loops are used.

Flash attention, cache type (float16) and weight repacking are at llama.cpp's defaults; the file is memory-mapped.

Run as a command it is llama.cpp's own quantizer with its default settings:
python -m runtime_tests.bench.runners.llamacpp IN.gguf OUT.gguf q4_k_m
"""

import ctypes
import sys
from collections.abc import Sequence

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from runtime_tests.jobs import Opening
from runtime_tests.sessions import Session

from .session import SessionRunner

PIECE = 512
"""Most tokens per call, n_batch and n_ubatch: llama.cpp computes longer prompts in pieces of this many anyway."""
_SILENT = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
"""llama.cpp logs a page about every model; failures are seen in what its functions return. Never freed."""


class LlamaSession(Session):
    """One model and one context; llama.cpp counts positions itself, so it cannot be rewound."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), _model_parameters())
        if not self._model:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        self._context = llama_cpp.llama_init_from_model(self._model, context_parameters(context, threads))
        if not self._context:
            raise ValueError(f"{path}: llama.cpp cannot make a context of {context} tokens for it")
        batch = int(llama_cpp.llama_n_batch(self._context))  # a longer one aborts the process
        vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        super().__init__(context, batch, "last", vocab_size)

    def reset(self) -> None:
        super().reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def step(self, tokens: Sequence[int], _position: int) -> NDArray[np.float32]:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        # a batch without flags gives the logits of its last token only
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise ValueError(f"llama_decode: status {status} for {len(tokens)} tokens")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (1, self.vocab_size))


def _model_parameters() -> llama_cpp.llama_model_params:
    parameters = llama_cpp.llama_model_default_params()
    parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    parameters.n_gpu_layers = 0
    return parameters


def context_parameters(context: int, threads: int) -> llama_cpp.llama_context_params:
    """Cache slots in tokens; as many threads for prompts as for single tokens."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = context
    parameters.n_batch = parameters.n_ubatch = min(PIECE, context)
    parameters.n_threads = parameters.n_threads_batch = threads
    return parameters


def open_runner(opening: Opening) -> SessionRunner:
    """Load a GGUF."""
    return SessionRunner(LlamaSession(opening.path, opening.context, opening.threads))


def quantize(source: str, out: str, kind: str) -> None:
    """Quantize one file; llama.cpp prints what becomes of each tensor."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters))
    if status != 0:
        sys.exit(f"llama_model_quantize: status {status}")


if __name__ == "__main__":
    quantize(*sys.argv[1:])
