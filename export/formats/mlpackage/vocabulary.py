"""What `graph.py` and coremltools' backend write, and whether a finished package holds anything else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.formats import schema
from export.manifest import IOContract, Manifest

from . import FILES, MODEL, WEIGHTS, cache_shape, listing, metadata
from .read import feature

OPERATIONS = frozenset({
    "abs", "add", "cast", "clip", "concat", "const", "constexpr_blockwise_shift_scale", "cumsum", "equal",
    "expand_dims", "gather", "linear", "matmul", "maximum", "minimum", "mod", "mul", "read_state", "reduce_max",
    "reduce_mean", "reshape", "rsqrt", "scaled_dot_product_attention", "shape", "silu", "slice_by_index",
    "slice_by_size", "slice_update", "softmax", "split", "square", "sub", "tile", "transpose", "write_state",
    "greater", "less", "logical_and", "logical_or",  # of earlier releases only, which new ones are compared with
})  # fmt: skip
_FIELDS = {
    "model": {"specificationVersion", "description", "mlProgram"},
    "description": {"input", "output", "state", "metadata"},
    "metadata": {"license", "userDefined"},
    "program": {"version", "functions"},
    "function": {"inputs", "opset", "block_specializations"},
    "block": {"operations", "outputs"},
    "operation": {"type", "inputs", "outputs", "attributes"},
}
"""Fields that are ever set."""
_MODEL, _CONTENTS, _ = FILES
_IDENTIFIER = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BLOBS = {"", "@model_path/weights/weight.bin"}


def foreign(folder: Path, described: Manifest) -> Iterator[str]:
    """Everything in the files that a build does not write."""
    yield from (f"{folder / _CONTENTS}: {line}; refused" for line in _items(folder / _CONTENTS))
    spec = schema.parsed(schema.module("coremltools", "proto", "Model_pb2").Model(), folder / _MODEL)
    yield from (f"{folder / _MODEL}: {line}; refused" for line in _parts(spec, described))


def _items(path: Path) -> Iterator[str]:
    """Of the table of contents: two items, one of them the model, and nothing else about them."""
    data = schema.read(path)
    listed = json.loads(data)
    paths = {key: str(entry["path"]) for key, entry in listed["itemInfoEntries"].items()}
    foreign_items = sorted(item for item in paths.values() if item not in (MODEL, WEIGHTS))
    yield from (f"item {item!r}" for item in foreign_items)
    if paths.get(listed["rootModelIdentifier"]) != MODEL:
        yield "the model is another item"
    elif not foreign_items:
        named = {item: key for key, item in paths.items() if _IDENTIFIER.fullmatch(key)}
        if data != listing(named.get(MODEL, ""), named.get(WEIGHTS, "")).encode():
            yield "not written as a build writes it"


def _parts(spec: Any, described: Manifest) -> Iterator[str]:
    """Of the model: fields, functions, operations, weight files and metadata that are none of ours."""
    about, program = spec.description, spec.mlProgram
    yield from _unknown("model", spec)
    yield from _unknown("description", about)
    yield from _unknown("metadata", about.metadata)
    yield from _unknown("program", program)
    if dict(about.metadata.userDefined) != metadata(described.plan, described.quantization.key):
        yield "metadata is not that of the manifest"
    yield from _interface(about, described.contract)
    for name, function in program.functions.items():
        if name != "main":
            yield f"function {name!r}"
        yield from _unknown("function", function)
        for block in function.block_specializations.values():
            yield from _unknown("block", block)
            for operation in block.operations:
                yield from _operation(operation)


def _interface(about: Any, contract: IOContract) -> Iterator[str]:
    """Shapes that are not the contract's: sessions count slots, and tokens of a call, by the contract."""
    most = {"sequence": contract.max_prefill, "total": contract.kv.context_length}
    if any(spec.shape != cache_shape(contract.kv) for spec in contract.states):
        yield f"the contract's states are not of {contract.kv.room} slots, as its cache is"
    for kind, found, wanted in (("input", about.input, contract.inputs), ("state", about.state, contract.states)):
        shapes = {each.name: feature(each).shape for each in found}
        for spec in wanted:
            shape = tuple(f"1…{most[size]}" if isinstance(size, str) else size for size in spec.shape)
            if (its := shapes.get(spec.name, ())) != shape:
                yield f"{kind} {spec.name} is {list(its)}, the contract says {list(shape)}"


def _operation(operation: Any) -> Iterator[str]:
    if operation.type not in OPERATIONS:
        yield f"operation {operation.type!r}"
    yield from _unknown("operation", operation)
    bindings = (binding for argument in operation.inputs.values() for binding in argument.arguments)
    values = [*(binding.value for binding in bindings), *operation.attributes.values()]
    if any(schema.fields(value.immediateValue) - {"tensor"} for value in values):
        yield f"a value that is no tensor, of operation {operation.type!r}"
    for file in sorted({value.blobFileValue.fileName for value in values} - _BLOBS):
        yield f"weight file {file!r}"


def _unknown(kind: str, message: Any) -> Iterator[str]:
    yield from (f"the {kind} has {field}" for field in sorted(schema.fields(message) - _FIELDS[kind]))
