"""llama.cpp's own quantizer with its default settings, as a process.

python -m runtime_tests.bench.runners.llama_quantize IN.gguf OUT.gguf q4_k_m
"""

import ctypes
import sys

import llama_cpp

_TYPES = {
    kind: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    for kind in ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k")
}


def main(source: str, out: str, kind: str) -> None:
    """Quantize one file; llama.cpp prints what becomes of each tensor."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = _TYPES[kind]
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters))
    if status != 0:
        sys.exit(f"llama_model_quantize: status {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
