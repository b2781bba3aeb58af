"""ONNX files read from their protobuf; external data is never opened, onnxruntime not asked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, external_data_helper

from ..backends._onnx_weights import Codes, StoredTensors
from ..backends.onnx_kv import STACKED, codes_of, rows_of
from ..contents import BITS, Contents, Entry, StoredTensor, counted, size, split_rows
from ..contract import TensorSpec
from ..errors import ExportError
from ..plan import Architecture
from . import head, outside

FORMAT = "ONNX"
CONFIG = "genai_config.json"
PAST = {"GroupQueryAttention": slice(3, 5), "MultiHeadAttention": slice(6, 8), "Attention": slice(4, 6)}
"""Which inputs of an attention node are the cache."""


def recognizes(path: Path) -> bool:
    """ONNX has no magic number: its first field is the varint ir_version, then a string or the graph.

    So do Core ML's older files of one piece, which end otherwise.
    """
    first = head(path, 3)
    return path.suffix != ".mlmodel" and len(first) == 3 and first[0] == 0x08 and first[1] < 0x80 and first[2] & 7 == 2


def parse(path: Path) -> Any:
    """The ModelProto without its external data."""
    model = onnx.load(path, load_external_data=False)
    if not model.graph.node:
        raise ExportError(f"{path}: an ONNX file without nodes")
    return model


def contents(path: Path, architecture: Architecture | None) -> Contents:
    """Nodes, interface and initializers; the cache is what attention nodes take as past."""
    model = parse(path)
    graph, inputs = model.graph, {value.name: spec(value) for value in model.graph.input}
    past = [name for node in graph.node for name in node.input[PAST.get(node.op_type, slice(0, 0))] if name in inputs]
    held = {tensor.name for tensor in graph.initializer}
    entry = Entry(
        name=graph.name or "main",
        inputs=tuple(one for name, one in inputs.items() if name not in held),
        outputs=tuple(spec(value) for value in graph.output),
        value=None,
    )
    opsets = ", ".join(f"{one.domain or 'ai.onnx'} {one.version}" for one in model.opset_import)
    external = sorted({location(one) for one in tensors_in(graph) if external_data_helper.uses_external_data(one)})
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
        ops=counted(node.op_type for node in nodes_in(graph)),
        delegate_calls={},
        delegated_ops={},
        tensors=tuple(stored(graph, path.parent, architecture)),
        bytes=path.stat().st_size + sum(file_size(path.parent, name) for name in external),
    )


def file_size(folder: Path, reference: str) -> int:
    """Bytes of a data file; 0 where it is missing or must not be followed."""
    file = folder / reference
    return file.stat().st_size if outside(folder, reference) is None and file.is_file() else 0


def spec(value: Any) -> TensorSpec:
    """One input or output."""
    kind = value.type.tensor_type
    dims = tuple(one.dim_param or one.dim_value for one in kind.shape.dim)
    return TensorSpec(name=value.name, dtype=dtype(kind.elem_type), shape=dims)


def dtype(code: int) -> str:
    """ONNX element type under the name we use."""
    name = str(TensorProto.DataType.Name(code)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def stored(graph: Any, folder: Path, architecture: Architecture | None) -> Iterator[StoredTensor]:
    """Every initializer; codes of quantized matrices as integers [N, K], stacked ones taken apart."""
    tensors = StoredTensors(graph.initializer, folder)
    makers = {output: node for node in graph.node for output in node.output}
    quantized = {codes.q: codes for node in graph.node for codes in [known_codes(node, tensors, makers)] if codes}
    scales = {codes.scale: codes for codes in quantized.values()}
    for tensor in graph.initializer:
        if codes := quantized.get(tensor.name) or scales.get(tensor.name):
            yield from one_quantized(tensor, codes, architecture)
        else:
            name = tensor.name
            rows = float_rows(name, architecture) if architecture else {name: 0}
            yield from split_rows(name, rows, plain(tensor))


def known_codes(node: Any, tensors: StoredTensors, makers: dict[str, Any]) -> Codes | None:
    """The quantized matrix a node reads, in the layout that onnxruntime's own tools write today."""
    if node.op_type not in {"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"}:
        return None
    q, scale = (0, 2) if node.op_type == "GatherBlockQuantized" else (1, 2)
    held = [tensors.tensors.get(node.input[i]) for i in (q, scale)]
    ours = held[0] is not None and len(held[0].dims) == 3 and (held[1] is None or len(held[1].dims) > 1)
    return codes_of(node, tensors, makers) if ours else None  # else the codes count as a plain tensor


def one_quantized(tensor: Any, codes: Codes, architecture: Architecture | None) -> Iterator[StoredTensor]:
    """Integers, or scales, of a matrix under the matrix's name."""
    plainly = plain(tensor)
    if tensor.name == codes.q:
        kind = f"int{codes.bits}" if codes.levels == "even" else codes.levels
        update = {"dtype": kind, "shape": (codes.rows, codes.columns)}
    else:
        update = {"kind": "scales", "shape": (codes.rows, 1 if codes.per_channel else codes.blocks)}
    rows = rows_of(codes, architecture) if architecture else {codes.q.removesuffix(".q"): codes.rows}
    yield from split_rows(codes.q.removesuffix(".q"), rows, plainly.model_copy(update=update))


def plain(tensor: Any) -> StoredTensor:
    """One initializer as it stands."""
    kind, shape = dtype(tensor.data_type), tuple(tensor.dims)
    length = size(kind, shape) if kind in BITS else len(tensor.raw_data)
    return StoredTensor(name=tensor.name, kind="weight", dtype=kind, shape=shape, bytes=length)


def float_rows(name: str, architecture: Architecture) -> dict[str, int]:
    """Our names of float matrices stacked in one initializer, and their rows."""
    prefix, _, kind = name.removesuffix(".weight").rpartition(".")
    shapes = architecture.linear_shapes()
    parts = [f"{prefix}.{part}.weight" for part in STACKED.get(kind, ())]
    return {part: shapes[part][0] for part in parts if part in shapes} or {name: 0}


def tensors_in(graph: Any) -> Iterator[Any]:
    """Initializers and tensors in attributes, of subgraphs too: whatever may point at a data file."""
    yield from graph.initializer
    for one in graph.sparse_initializer:
        yield from (one.values, one.indices)
    for node in graph.node:
        yield from tensors_of(node)


def tensors_of(node: Any) -> Iterator[Any]:
    """Those in one node's attributes."""
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.TENSOR, AttributeProto.TENSORS):
            yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            if graph.node or graph.initializer:
                yield from tensors_in(graph)


def nodes_in(graph: Any) -> Iterator[Any]:
    """Nodes, of subgraphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_in(inner)


def all_tensors(model: Any) -> Iterator[Any]:
    """Of the graph, of training graphs and of functions."""
    yield from tensors_in(model.graph)
    for one in model.training_info:
        yield from (*tensors_in(one.initialization), *tensors_in(one.algorithm))
    for function in model.functions:
        for node in function.node:
            yield from tensors_of(node)


def location(tensor: Any) -> str:
    """The data file a tensor names; the last entry counts, as it does to onnx."""
    return next((one.value for one in reversed(tensor.external_data) if one.key == "location"), "")


def escapes(path: Path) -> Iterator[str]:
    """External data, and the file that onnxruntime-genai is told to open."""
    for tensor in all_tensors(parse(path)):
        if external_data_helper.uses_external_data(tensor) and (why := outside(path.parent, location(tensor))):
            yield f"{path.name}: {tensor.name}: external data {location(tensor)!r} {why}"
    config = path.parent / CONFIG
    if config.is_file():
        for key, value in strings(json.loads(config.read_bytes())):
            if key == "filename" and (why := outside(path.parent, value)):
                yield f"{CONFIG}: filename {value!r} {why}"


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value with the key it stands at."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, key)


def structure(path: Path) -> Iterator[str]:
    """External tensors that do not lie in their data file, or not in as many bytes as their shape takes."""
    parse(path)
    for tensor in all_tensors(onnx.load(path, load_external_data=False)):
        if not external_data_helper.uses_external_data(tensor):
            continue
        where = external_data_helper.ExternalDataInfo(tensor)
        begin, length, wanted = where.offset or 0, where.length, size(dtype(tensor.data_type), tensor.dims)
        if length is not None and length != wanted:
            yield f"{path.name}: {tensor.name}: {length} bytes of external data, its shape takes {wanted}"
        if begin < 0 or begin + wanted > file_size(path.parent, where.location):
            yield f"{path.name}: {tensor.name}: lies outside {where.location}"
