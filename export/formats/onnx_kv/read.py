"""ONNX files read from their protobuf, without onnxruntime; external data is opened by `read_weights` only."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, external_data_helper

from export.architecture import Architecture
from export.errors import ExportError
from export.formats import Contents, Entry, StoredTensor, counted, element_bits, head, outside, size, split_rows
from export.manifest import TensorSpec

from .graph import MATMULS
from .weights import PASSED_ON, Codes, StoredTensors, codes_of, read_weights, rows_of, stacked_rows

__all__ = ["FORMAT", "contents", "product_bytes", "read_weights", "recognizes", "structure"]

FORMAT = "ONNX"
_PAST = {"GroupQueryAttention": slice(3, 5), "MultiHeadAttention": slice(6, 8), "Attention": slice(4, 6)}
"""Attention nodes → the inputs that are the cache."""
_STOCK_MATMULS = {"MatMul", "Gemm"}
"""Products with stored weights that other exporters write."""


def recognizes(path: Path) -> bool:
    """ONNX has no magic number: its first field is the varint ir_version, then a string or the graph.

    Core ML's older one-file models begin alike, but are named `.mlmodel`.
    """
    first = head(path, 3)
    return path.suffix != ".mlmodel" and len(first) == 3 and first[0] == 0x08 and first[1] < 0x80 and first[2] & 7 == 2


def _parse(path: Path) -> Any:
    """The ModelProto without its external data."""
    model = onnx.load(path, load_external_data=False)
    if not model.graph.node:
        raise ExportError(f"{path}: an ONNX file without nodes")
    return model


def contents(path: Path, architecture: Architecture | None) -> Contents:
    """Nodes, interface and initializers; the cache is the inputs that attention nodes take as past."""
    model = _parse(path)
    graph, inputs = model.graph, {value.name: _spec(value) for value in model.graph.input}
    past = [name for node in graph.node for name in node.input[_PAST.get(node.op_type, slice(0, 0))] if name in inputs]
    initializers = {tensor.name for tensor in graph.initializer}
    entry = Entry(
        name=graph.name or "main",
        inputs=tuple(spec for name, spec in inputs.items() if name not in initializers),
        outputs=tuple(map(_spec, graph.output)),
        value=None,
    )
    opsets = ", ".join(f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in model.opset_import)
    external = sorted({_location(t) for t in _tensors_in(graph) if external_data_helper.uses_external_data(t)})
    return Contents(
        format=FORMAT,
        facts={
            "producer": f"{model.producer_name} {model.producer_version}".strip(),
            "ir version": str(model.ir_version),
            "opsets": opsets,
            "external data": ", ".join(external) or "none",
        },
        entries=(entry,),
        cache=tuple(inputs[name] for name in dict.fromkeys(past)),
        ops=counted(node.op_type for node in _nodes_in(graph)),
        delegate_calls={},
        delegated_ops={},
        tensors=tuple(_stored_tensors(graph, path.parent, architecture)),
        bytes=path.stat().st_size + sum(_file_size(path.parent, name) for name in external),
    )


def _file_size(folder: Path, reference: str) -> int:
    """Bytes of a data file; 0 where it is missing or must not be followed."""
    file = folder / reference
    return file.stat().st_size if outside(folder, reference) is None and file.is_file() else 0


def _spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return TensorSpec(name=value.name, dtype=_dtype(kind.elem_type), shape=dims)


def _dtype(code: int) -> str:
    name = str(TensorProto.DataType.Name(code)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _stored_tensors(graph: Any, folder: Path, architecture: Architecture | None) -> Iterator[StoredTensor]:
    """Every initializer; codes of quantized matrices as integers [N, K], stacked ones split."""
    tensors = StoredTensors(graph.initializer, folder)
    makers = {output: node for node in graph.node for output in node.output}
    quantized = {codes.q: codes for node in graph.node for codes in [_known_codes(node, tensors, makers)] if codes}
    scales = {codes.scale: codes for codes in quantized.values()}
    for tensor in graph.initializer:
        if codes := quantized.get(tensor.name) or scales.get(tensor.name):
            yield from _quantized(tensor, codes, architecture)
        else:
            name = tensor.name
            rows = (architecture and stacked_rows(name, architecture)) or {name: 0}
            yield from split_rows(name, rows, _plain(tensor))


def _known_codes(node: Any, tensors: StoredTensors, makers: dict[str, Any]) -> Codes | None:
    """The quantized matrix that a node reads, in the layout that we and onnxruntime's current tools write, else None.

    Codes in any other layout count as plain tensors.
    """
    if node.op_type not in {"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"}:
        return None
    q, scale = (0, 2) if node.op_type == "GatherBlockQuantized" else (1, 2)
    codes, scales = (tensors.tensors.get(node.input[i]) for i in (q, scale))
    known = codes is not None and len(codes.dims) == 3 and (scales is None or len(scales.dims) > 1)
    return codes_of(node, tensors, makers) if known else None


def _quantized(tensor: Any, codes: Codes, architecture: Architecture | None) -> Iterator[StoredTensor]:
    """Integers or scales of a matrix, under the names of its weights."""
    if tensor.name == codes.q:
        kind = f"int{codes.bits}" if codes.levels == "even" else codes.levels
        update = {"dtype": kind, "shape": (codes.rows, codes.columns)}
    else:
        update = {"kind": "scales", "shape": (codes.rows, 1 if codes.per_channel else codes.blocks)}
    rows = rows_of(codes, architecture) if architecture else {codes.q.removesuffix(".q"): codes.rows}
    yield from split_rows(codes.q.removesuffix(".q"), rows, _plain(tensor).model_copy(update=update))


def _plain(tensor: Any) -> StoredTensor:
    kind, shape = _dtype(tensor.data_type), tuple(tensor.dims)
    length = size(kind, shape) if element_bits(kind) else len(tensor.raw_data)
    return StoredTensor(name=tensor.name, kind="weight", dtype=kind, shape=shape, bytes=length)


def _tensors_in(graph: Any) -> Iterator[Any]:
    """Initializers and tensors in attributes, of subgraphs too: all that may refer to a data file."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _tensors_of(node)


def _tensors_of(node: Any) -> Iterator[Any]:
    """Tensors in the attributes of a node."""
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.TENSOR, AttributeProto.TENSORS):
            yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            if graph.node or graph.initializer:
                yield from _tensors_in(graph)


def _nodes_in(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes_in(inner)


def _all_tensors(model: Any) -> Iterator[Any]:
    """Tensors of the graph, of training graphs and of functions."""
    yield from _tensors_in(model.graph)
    for training in model.training_info:
        yield from (*_tensors_in(training.initialization), *_tensors_in(training.algorithm))
    for function in model.functions:
        for node in function.node:
            yield from _tensors_of(node)


def _location(tensor: Any) -> str:
    """The data file of a tensor; the last of several entries counts, as it does in onnx."""
    return next((entry.value for entry in reversed(tensor.external_data) if entry.key == "location"), "")


def structure(path: Path) -> Iterator[str]:
    """External tensors that do not lie inside their data file or whose length is not that of their shape."""
    _parse(path)
    for tensor in _all_tensors(onnx.load(path, load_external_data=False)):
        if not external_data_helper.uses_external_data(tensor):
            continue
        external = external_data_helper.ExternalDataInfo(tensor)
        begin, length, expected = external.offset or 0, external.length, size(_dtype(tensor.data_type), tensor.dims)
        if length is not None and length != expected:
            yield f"{path.name}: {tensor.name}: {length} bytes of external data, its shape takes {expected}"
        if begin < 0 or begin + expected > _file_size(path.parent, external.location):
            yield f"{path.name}: {tensor.name}: lies outside {external.location}"


def product_bytes(artifact: Path) -> int:
    """Bytes of the initializers that matrix products take, directly or through a cast or reshape, once each."""
    graph = onnx.load(artifact, load_external_data=False).graph
    makers = {node.output[0]: node.input[0] for node in graph.node if node.op_type in PASSED_ON}

    def origin(name: str) -> str:
        return origin(makers[name]) if name in makers else name

    read = {origin(name) for node in graph.node if node.op_type in MATMULS | _STOCK_MATMULS for name in node.input}
    return sum(_stored_bytes(tensor) for tensor in graph.initializer if tensor.name in read)


def _stored_bytes(tensor: Any) -> int:
    count: int = prod(tensor.dims)
    if tensor.data_type in {TensorProto.INT4, TensorProto.UINT4}:  # two to a byte; numpy has no such dtype
        return (count + 1) // 2
    return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
