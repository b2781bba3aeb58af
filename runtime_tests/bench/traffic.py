"""Bytes that one decoded token must read: weights as an artifact stores them, and its cache. Times nothing."""

from math import prod
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.manifest import Manifest
from export.plan import Architecture, WeightScheme

from ..latency import bytes_per_token, stored_bytes

MATMULS = ("MatMulNBits", "MatMul", "Gemm")
CHANGES = ("Cast", "Expand", "Reshape")
KV_BYTES = {"float32": 4, "float16": 2}


def weight_bytes(model: Path, described: Manifest, *, ours: bool) -> int:
    """Bytes of the weights that a matrix product of every token reads; of an embedding table alone one row is read.

    GGUF and ONNX say it themselves. A .pte hides its weights in the delegate's data, so there the recipe says it:
    ours, or `export_llm`'s with all linears and the head alike.
    """
    if model.suffix == ".gguf":
        return gguf_bytes(model)
    if model.suffix == ".onnx":
        return onnx_bytes(model)
    if model.suffix != ".pte":
        raise ExportError(f"{model}: what its weights take is known of .gguf, .onnx and .pte files")
    return bytes_per_token(described) if ours else alike_bytes(described.architecture, described.plan.quant.linear)


def gguf_bytes(model: Path) -> int:
    """Every matrix; the embedding only where it is the head too."""
    from gguf import GGUFReader

    found = {tensor.name: tensor for tensor in GGUFReader(model).tensors}
    untied = "output.weight" in found
    return sum(
        int(tensor.n_bytes)
        for name, tensor in found.items()
        if len(tensor.shape) > 1 and not (untied and name == "token_embd.weight")
    )


def onnx_bytes(model: Path) -> int:
    """Initializers that a matrix product takes, also changed in form or type on the way, once each."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    changed = {node.output[0]: node.input[0] for node in graph.node if node.op_type in CHANGES}

    def origin(name: str) -> str:
        return origin(changed[name]) if name in changed else name

    read = {origin(name) for node in graph.node if node.op_type in MATMULS for name in node.input}
    halves = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)  # two to a byte, which numpy does not know

    def stored(tensor: Any) -> int:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        count = prod(tensor.dims)
        return int((count + 1) // 2 if tensor.data_type in halves else count * size)

    total: int = sum(stored(tensor) for tensor in graph.initializer if tensor.name in read)
    return total


def alike_bytes(a: Architecture, scheme: WeightScheme | None) -> int:
    """All linears and the head in one scheme, with 16-bit scales."""
    shapes = [(a.vocab_size, a.hidden_size), *a.linear_shapes().values()]
    return int(sum(stored_bytes(shape, scheme) for shape in shapes))


def kv_bytes_per_position(a: Architecture, dtype: str) -> int:
    """Keys and values of one position in all layers."""
    return 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * KV_BYTES[dtype]


def bound_share(*, tokens_per_s: float, bytes_per_token: float, bandwidth_bytes_per_s: float) -> float:
    """Part of the rate that reading alone would allow."""
    return tokens_per_s * bytes_per_token / bandwidth_bytes_per_s
