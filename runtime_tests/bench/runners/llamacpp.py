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

    def __init__(self, opening: Opening) -> None:
        path, context = opening.path, opening.context
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), _model_parameters())
        if not self._model:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        self._context = llama_cpp.llama_init_from_model(self._model, context_parameters(opening))
        if not self._context:
            raise ValueError(f"{path}: llama.cpp cannot make a context of {context} tokens for it")
        self._memory = llama_cpp.llama_get_memory(self._context)
        batch = int(llama_cpp.llama_n_batch(self._context))  # a longer one aborts the process
        vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        super().__init__(context, batch, "last", vocab_size)
        self._state: ctypes.Array[ctypes.c_uint8] | None = None

    def reset(self) -> None:
        super().reset()
        llama_cpp.llama_memory_clear(self._memory, True)

    def occupy(self, position: int) -> None:
        """Go on as after `position` tokens: the state of one piece is read again and again, and moved to its place."""
        self.reset()
        if self._state is None:
            self.feed(range(1, self.largest_call + 1))
            room = llama_cpp.llama_state_seq_get_size(self._context, 0)
            self._state = (ctypes.c_uint8 * room)()
            llama_cpp.llama_state_seq_get_data(self._context, self._state, room, 0)
            self.reset()
        for begin in range(0, position, self.largest_call):  # in sequence 1, which then becomes a part of sequence 0
            if not llama_cpp.llama_state_seq_set_data(self._context, self._state, len(self._state), 1):
                raise ValueError(f"llama.cpp cannot read its own state at {begin} tokens")
            llama_cpp.llama_memory_seq_add(self._memory, 1, 0, -1, begin)
            llama_cpp.llama_memory_seq_cp(self._memory, 1, 0, -1, -1)
        llama_cpp.llama_memory_seq_rm(self._memory, 1, -1, -1)
        llama_cpp.llama_memory_seq_rm(self._memory, 0, position, -1)
        self.tokens = [0] * position

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


def context_parameters(opening: Opening) -> llama_cpp.llama_context_params:
    """Cache slots in tokens; as many threads for prompts as for single tokens."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = opening.context
    parameters.n_batch = parameters.n_ubatch = min(PIECE, opening.context)
    parameters.n_threads = parameters.n_threads_batch = opening.threads
    if opening.flash_attention is not None:
        kinds = (llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED)
        parameters.flash_attn_type = kinds[opening.flash_attention]
    if opening.kv:
        parameters.type_k = kind = getattr(llama_cpp, f"GGML_TYPE_{opening.kv.upper()}")
        if opening.flash_attention:  # without it, values cannot be quantized
            parameters.type_v = kind
        parameters.n_seq_max, parameters.kv_unified = 2, True  # for `occupy`
    return parameters


class _LlamaRunner(SessionRunner):
    session: LlamaSession

    def occupy(self, position: int) -> None:
        self.session.occupy(position)


def open_runner(opening: Opening) -> SessionRunner:
    """Load a GGUF."""
    return _LlamaRunner(LlamaSession(opening))


def quantize(source: str, out: str, kind: str) -> None:
    """Quantize one file; llama.cpp prints what becomes of each tensor."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters))
    if status != 0:
        sys.exit(f"llama_model_quantize: status {status}")


if __name__ == "__main__":
    quantize(*sys.argv[1:])
