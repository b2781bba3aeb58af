"""llama.cpp's own quantizer with its default settings, as a process. Knows nothing about where the file comes from.

python -m runtime_tests.bench.llama_quantize IN.gguf OUT.gguf q4_k_m
"""

import ctypes
import sys

import llama_cpp

TYPES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def main(source: str, out: str, kind: str) -> None:
    """Quantize one file; llama.cpp prints what becomes of each tensor."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind]
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters))
    if status != 0:
        sys.exit(f"llama_model_quantize: status {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
