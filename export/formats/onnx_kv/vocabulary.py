"""What `graph.py` writes, and whether a finished model.onnx or genai_config.json holds anything else.

onnxruntime follows what a file says: functions, subgraphs, metadata that sets options, data files by name. Ours have
plain nodes only, and one data file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.formats import schema
from export.manifest import KVLayout, Manifest, flat

from . import FILE, GENAI_CONFIG, genai_config

_CONTRIB = "com.microsoft"
"""onnxruntime's own operators."""
OPERATORS = {
    **dict.fromkeys(("Add", "Cast", "Expand", "Gather", "Mul", "ReduceSum", "Reshape", "Shape", "Split", "Sub"), ""),
    "SimplifiedLayerNormalization": "",
    **dict.fromkeys(("FusedMatMul", "MatMulBnb4", "MatMulNBits", "GatherBlockQuantized"), _CONTRIB),
    **dict.fromkeys(("GroupQueryAttention", "QuickGelu", "SkipSimplifiedLayerNormalization"), _CONTRIB),
}
"""Operator → its domain."""
INT8_CACHE: dict[str, int | str] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
"""Attributes of GroupQueryAttention."""
_WINDOW = ("local_window_size", "sliding_window_cache")
DATA = f"{FILE}.data"
_FIELDS = {
    "model": {"ir_version", "producer_name", "opset_import", "graph"},
    "graph": {"node", "name", "initializer", "input", "output"},
    "node": {"input", "output", "name", "op_type", "domain", "attribute"},
    "attribute": {"name", "type", "f", "i", "s"},
    "initializer": {"name", "dims", "data_type", "data_location", "external_data", "int64_data"},
}
"""Fields that are ever set."""
_PLACE = {"location", "offset", "length"}
"""What is said of a tensor's place in the data file."""


def foreign(folder: Path, described: Manifest) -> Iterator[str]:
    """Everything in the files that a build does not write."""
    yield from _options(folder, described)
    onnx: Any = schema.module("onnx", "", "onnx_ml_pb2")
    model = schema.parsed(onnx.ModelProto(), folder / FILE)
    yield from (f"{folder / FILE}: {line}; refused" for line in _parts(model, window(described.contract.kv)))


def window(kv: KVLayout) -> dict[str, int]:
    """Attributes of GroupQueryAttention for the tokens that each one attends to."""
    if kv.window is None:
        return {}
    return {"local_window_size": kv.window} | ({"sliding_window_cache": 1} if kv.slots else {})


def _options(folder: Path, described: Manifest) -> Iterator[str]:
    """onnxruntime-genai loads libraries, providers and files by this configuration; ours is made of the manifest."""
    path = folder / GENAI_CONFIG
    expected = genai_config(described.architecture, described.contract, described.tokenizer)
    data = schema.read(path)
    if data == expected.encode():
        return
    found, ours = _flat(data), flat(json.loads(expected))
    missing = object()
    for key in [*(found.keys() - ours.keys()), *ours]:
        if found.get(key, missing) != (value := ours.get(key, missing)):
            ending = "not set by a build" if value is missing else f"{value!r} in a build"
            yield f"{path}: {key}: {ending}, {_shown(found, key)}; refused"
            return
    yield f"{path}: not written as a build writes it; build the artifact again"


def _shown(found: dict[str, Any], key: str) -> str:
    return f"{found[key]!r} here" if key in found else "missing here"


def _flat(data: bytes) -> dict[str, Any]:
    try:
        return flat(json.loads(data))
    except (ValueError, RecursionError):
        return {}


def _parts(model: Any, windows: dict[str, int]) -> Iterator[str]:
    """Of the file: fields, operators, domains and data files that are none of ours."""
    yield from _unknown("model", model, "")
    yield from _unknown("graph", model.graph, "")
    yield from (f"operators of {opset.domain!r}" for opset in model.opset_import if opset.domain not in {"", _CONTRIB})
    for node in model.graph.node:
        if OPERATORS.get(node.op_type) != node.domain:
            yield f"node {node.name!r}: operator {node.op_type!r} of {node.domain or 'ai.onnx'!r}"
        yield from _unknown("node", node, node.name)
        if node.op_type == "GroupQueryAttention":
            found = {one.name: one.i for one in node.attribute if one.name in _WINDOW}
            if found != windows:
                yield f"node {node.name!r}: {found or 'no window'}, the manifest has {windows or 'none'}"
        for attribute in node.attribute:
            yield from _unknown("attribute", attribute, f"{node.name}.{attribute.name}")
            if attribute.s and attribute.s.decode() != INT8_CACHE.get(attribute.name):
                yield f"attribute {f'{node.name}.{attribute.name}'!r} is {attribute.s[:100]!r}"
    for tensor in model.graph.initializer:
        yield from _unknown("initializer", tensor, tensor.name)
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if tensor.external_data and places != [DATA]:
            yield f"{tensor.name!r}: external data {', '.join(places)!r}, not {DATA}"
        for key in sorted({entry.key for entry in tensor.external_data} - _PLACE):
            yield f"{tensor.name!r}: external data with {key!r}"


def _unknown(kind: str, message: Any, name: str) -> Iterator[str]:
    for field in sorted(schema.fields(message) - _FIELDS[kind]):
        yield f"{kind} {name!r} has {field}" if name else f"the {kind} has {field}"
