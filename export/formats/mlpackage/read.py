"""Core ML packages read from their protobuf, without Core ML; of weight.bin only headers and sizes are read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.architecture import Architecture
from export.errors import ExportError
from export.formats import Contents, Entry, StoredTensor, counted, head, outside, size, split_rows
from export.manifest import TensorSpec

from . import mil_name
from .file import data_type, expected, read_weights, shape_of, weight_of
from .messages import FeatureTypes_pb2, MIL_pb2, Model_pb2

__all__ = ["FORMAT", "contents", "product_bytes", "read_weights", "recognizes", "structure"]

FORMAT = "Core ML package"
_MODEL_PATH = "@model_path/"
"""Prefix by which an ML program refers to the folder of its model file."""
_QUANTIZED = {
    "constexpr_blockwise_shift_scale": ("data", "scale"),
    "constexpr_affine_dequantize": ("quantized_data", ""),
}
"""Operations that hold a quantized weight → the parameters of its integers and its scales."""
_Blob = tuple[str, int]
"""File and offset of a constant."""


def recognizes(path: Path) -> bool:
    """A folder with a package's table of contents."""
    return b"itemInfoEntries" in head(path / "Manifest.json", 65536)


def _items(package: Path) -> tuple[str, dict[str, str]]:
    """Path of the model file, and of every item by its identifier, as Manifest.json has them, below `Data`."""
    listed = json.loads((package / "Manifest.json").read_bytes())
    paths = {key: str(entry["path"]) for key, entry in listed["itemInfoEntries"].items()}
    return paths[listed["rootModelIdentifier"]], paths


def _parse(package: Path) -> tuple[Path, Any]:
    """The model file and its protobuf; an item outside the package is refused."""
    root, _ = _items(package)
    if why := outside(package / "Data", root):
        raise ExportError(f"{package}: Manifest.json: {root!r} {why}; refused")
    model, spec = package / "Data" / root, Model_pb2.Model()
    if not model.is_file():
        raise ExportError(f"{model}: missing; build the artifact again")
    spec.ParseFromString(model.read_bytes())
    if not spec.description.output:
        raise ExportError(f"{model}: a Core ML model without outputs; build the artifact again")
    return model, spec


def contents(path: Path, architecture: Architecture | None) -> Contents:
    """Functions, states, operations and constants; of a model that is no ML program the interface only."""
    _, spec = _parse(path)
    functions, about = dict(sorted(spec.mlProgram.functions.items())), spec.description
    described = {description.name: description for description in about.functions}
    operations = [op for function in functions.values() for op in _all_operations(function)]
    return Contents(
        format=FORMAT,
        facts={
            "specification version": str(spec.specificationVersion),
            "kind": str(spec.WhichOneof("Type")),
            **dict(sorted(about.metadata.userDefined.items())),
        },
        entries=tuple(_entry(name, described.get(name, about)) for name in functions or ("main",)),
        cache=tuple(feature(state) for state in about.state),
        ops=counted(op.type for op in operations if op.type != "const"),
        delegate_calls={},
        delegated_ops={},
        tensors=tuple(_stored_tensors(functions, architecture)),
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink()),
    )


def _entry(name: str, described: Any) -> Entry:
    inputs, outputs = (tuple(map(feature, side)) for side in (described.input, described.output))
    return Entry(name=name, inputs=inputs, outputs=outputs, value=None)


def feature(described: Any) -> TensorSpec:
    """One input, output or state; a dimension with a range is written `1…256`."""
    kind = described.type
    array = kind.stateType.arrayType if kind.WhichOneof("Type") == "stateType" else kind.multiArrayType
    names = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType
    dtype = {"DOUBLE": "FLOAT64"}.get(names.Name(array.dataType), names.Name(array.dataType)).lower()
    ranges = [(dim.lowerBound, dim.upperBound) for dim in array.shapeRange.sizeRanges]
    dims = tuple(low if low == high else f"{low}…{high if high >= 0 else ''}" for low, high in ranges)
    return TensorSpec(name=described.name, dtype=dtype, shape=dims or tuple(array.shape))


def _all_operations(function: Any) -> Iterator[Any]:
    """Operations of every variant of a function's body, inner blocks included."""
    waiting = [block for _, block in sorted(function.block_specializations.items())]
    while waiting:
        for op in waiting.pop(0).operations:
            yield op
            waiting += op.blocks


def _dtype_of(value: Any) -> str:

    return str(MIL_pb2.DataType.Name(data_type(value))).lower()


def _stored_tensors(functions: dict[str, Any], architecture: Architecture | None) -> Iterator[StoredTensor]:
    """Every constant in a weight file; its bytes are counted once, however many functions and operations share it."""
    seen: set[_Blob] = set()
    for function in functions.values():
        ours = _our_names(function, architecture) if architecture else {}
        for op in _all_operations(function):
            if op.outputs:
                yield from _constants(op, ours, architecture, seen)


def _constants(
    op: Any, ours: dict[str, tuple[str, ...]], architecture: Architecture | None, seen: set[_Blob]
) -> Iterator[StoredTensor]:
    """The constants of one operation that lie in a weight file, and small scales that lie in the program."""
    output = op.outputs[0].name
    _, scale = _QUANTIZED.get(op.type, ("", ""))
    for parameter, value in _values(op):
        blob = value.blobFileValue
        if value.WhichOneof("value") != "blobFileValue" and parameter != scale:
            continue
        new = (blob.fileName, blob.offset) not in seen or not blob.fileName
        seen.add((blob.fileName, blob.offset))
        dtype, shape = _dtype_of(value), shape_of(value)
        tensor = StoredTensor(
            name=output,
            kind="scales" if parameter == scale else "weight",
            dtype=dtype,
            shape=shape,
            bytes=size(dtype, shape) if new else 0,
        )
        names = ours.get(output, (output,))
        shapes = architecture.tensor_shapes() if architecture else {}
        yield from split_rows(names[0], {name: shapes.get(name, shape or (0,))[0] for name in names}, tensor)


def _values(op: Any) -> Iterator[tuple[str, Any]]:
    """Constants of an operation, by parameter."""
    if op.type == "const":
        yield "val", op.attributes["val"]
    for parameter, argument in sorted(op.inputs.items()):
        yield from ((parameter, binding.value) for binding in argument.arguments if binding.HasField("value"))


def _our_names(function: Any, architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Variables of our program → the checkpoint's names of the weights they hold."""
    operations = {op.outputs[0].name: op for op in _all_operations(function) if op.outputs}
    names = {weight_of(operations[output]): group for group, output in expected(architecture, set(operations))}
    return names | {mil_name((name,)): (name,) for name in architecture.norm_names()}


def structure(path: Path) -> Iterator[str]:
    """Items and constants that are missing or incomplete."""
    _, paths = _items(path)
    for item in paths.values():
        if not (path / "Data" / item).exists():
            yield f"{path.name}/Data/{item}: missing"
    model, spec = _parse(path)
    operations = (op for function in spec.mlProgram.functions.values() for op in _all_operations(function))
    for op in operations:
        for _, value in _values(op):
            if value.WhichOneof("value") == "blobFileValue" and (why := _misplaced(value, model.parent)):
                yield f"{path.name}: {op.outputs[0].name}: {why}"


def _misplaced(value: Any, folder: Path) -> str | None:
    """Why a constant cannot be read: its 64-byte record (magic, dtype, size, position) or its bytes are missing."""
    name, offset = value.blobFileValue.fileName.removeprefix(_MODEL_PATH), value.blobFileValue.offset
    file, expected_length = folder / name, size(_dtype_of(value), shape_of(value))
    if not file.is_file():
        return f"{name} is missing"
    with file.open("rb") as opened:
        opened.seek(offset)
        record = opened.read(64)
    marker, length, position = (int.from_bytes(record[a:b], "little") for a, b in ((0, 4), (8, 16), (16, 24)))
    if len(record) < 64 or marker != 0xDEADBEEF:
        return f"no constant at offset {offset} of {name}"
    if length != expected_length:
        return f"{length} bytes in {name}, its shape takes {expected_length}"
    return None if position + length <= file.stat().st_size else f"{name} ends before it"


def product_bytes(artifact: Path) -> int | None:
    """None: not read from packages."""
    del artifact
    return None
