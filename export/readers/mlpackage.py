"""Core ML packages read from their protobuf; weight.bin is measured, never opened, Core ML not asked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2

from ..backends._mil_llama import mil_name
from ..backends._mlpackage_file import data_type, expected, shape_of, weight_of
from ..contents import BITS, Contents, Entry, StoredTensor, counted, size, split_rows
from ..contract import TensorSpec
from ..errors import ExportError
from ..plan import Architecture
from . import head, outside

FORMAT = "Core ML package"
MODEL_PATH = "@model_path/"
"""How an ML program spells the folder of its model file."""
QUANTIZED = {
    "constexpr_blockwise_shift_scale": ("data", "scale"),
    "constexpr_affine_dequantize": ("quantized_data", ""),
}
"""Operations that hold a quantized weight → where its integers and its scales are."""
Blob = tuple[str, int]
"""File and offset of a constant."""


def recognizes(path: Path) -> bool:
    """A folder with the package's own table of contents."""
    return b"itemInfoEntries" in head(path / "Manifest.json", 65536)


def items(package: Path) -> tuple[str, dict[str, str]]:
    """Path of the model file and of every item, as Manifest.json has them, below `Data`."""
    listed = json.loads((package / "Manifest.json").read_bytes())
    paths = {key: str(entry["path"]) for key, entry in listed["itemInfoEntries"].items()}
    return paths[listed["rootModelIdentifier"]], paths


def parse(package: Path) -> tuple[Path, Any]:
    """The model file and its protobuf; an item outside the package is refused."""
    root, _ = items(package)
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
    """Functions, states, operations and constants. A model that is no ML program tells its interface only."""
    _, spec = parse(path)
    functions = dict(sorted(spec.mlProgram.functions.items()))
    described = {one.name: one for one in spec.description.functions}
    about, operations = spec.description, [op for one in functions.values() for op in all_operations(one)]
    return Contents(
        format=FORMAT,
        facts={
            "specification version": str(spec.specificationVersion),
            "kind": str(spec.WhichOneof("Type")),
            **dict(sorted(about.metadata.userDefined.items())),
        },
        entries=tuple(entry(name, described.get(name, about)) for name in functions or ("main",)),
        cache=tuple(feature(one) for one in about.state),
        ops=counted(op.type for op in operations if op.type != "const"),
        delegate_calls={},
        delegated_ops={},
        tensors=tuple(stored(functions, architecture)),
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink()),
    )


def entry(name: str, described: Any) -> Entry:
    """A function's interface."""
    inputs, outputs = (tuple(feature(one) for one in side) for side in (described.input, described.output))
    return Entry(name=name, inputs=inputs, outputs=outputs, value=None)


def feature(described: Any) -> TensorSpec:
    """One input, output or state; a dimension with a range is written `1…256`."""
    kind = described.type
    array = kind.stateType.arrayType if kind.WhichOneof("Type") == "stateType" else kind.multiArrayType
    names = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType
    dtype = {"DOUBLE": "FLOAT64"}.get(names.Name(array.dataType), names.Name(array.dataType)).lower()
    ranges = [(one.lowerBound, one.upperBound) for one in array.shapeRange.sizeRanges]
    dims = tuple(low if low == high else f"{low}…{high if high >= 0 else ''}" for low, high in ranges)
    return TensorSpec(name=described.name, dtype=dtype, shape=dims or tuple(array.shape))


def blocks(function: Any) -> Iterator[Any]:
    """The variants of a function's body."""
    yield from (block for _, block in sorted(function.block_specializations.items()))


def all_operations(function: Any) -> Iterator[Any]:
    """Operations, of inner blocks too."""
    waiting = list(blocks(function))
    while waiting:
        for op in waiting.pop(0).operations:
            yield op
            waiting += op.blocks


def dtype_of(value: Any) -> str:
    """MIL element type under the name we use."""
    return str(MIL_pb2.DataType.Name(data_type(value))).lower()


def stored(functions: dict[str, Any], architecture: Architecture | None) -> Iterator[StoredTensor]:
    """Every constant kept in a weight file, once, however many functions and operations share it."""
    seen: set[Blob] = set()
    for function in functions.values():
        ours = our_names(function, architecture) if architecture else {}
        for op in all_operations(function):
            if op.outputs:
                yield from constants(op, ours, architecture, seen)


def constants(
    op: Any, ours: dict[str, tuple[str, ...]], architecture: Architecture | None, seen: set[Blob]
) -> Iterator[StoredTensor]:
    """The constants of one operation that lie in a weight file, or small scales beside its integers."""
    output = op.outputs[0].name
    _, scale = QUANTIZED.get(op.type, ("", ""))
    for parameter, value in values(op):
        blob = value.blobFileValue
        if value.WhichOneof("value") != "blobFileValue" and parameter != scale:
            continue
        new = (blob.fileName, blob.offset) not in seen or not blob.fileName
        seen.add((blob.fileName, blob.offset))
        dtype, shape = dtype_of(value), shape_of(value)
        tensor = StoredTensor(
            name=output,
            kind="scales" if parameter == scale else "weight",
            dtype=dtype,
            shape=shape,
            bytes=size(dtype, shape) if new and dtype in BITS else 0,
        )
        names = ours.get(output, (output,))
        shapes = architecture.tensor_shapes() if architecture else {}
        yield from split_rows(names[0], {name: shapes.get(name, shape or (0,))[0] for name in names}, tensor)


def values(op: Any) -> Iterator[tuple[str, Any]]:
    """Constants written at an operation, by parameter."""
    if op.type == "const":
        yield "val", op.attributes["val"]
    for parameter, argument in sorted(op.inputs.items()):
        yield from ((parameter, one.value) for one in argument.arguments if one.HasField("value"))


def our_names(function: Any, architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Variables of our program → the checkpoint's names of what they hold."""
    operations = {op.outputs[0].name: op for op in all_operations(function) if op.outputs}
    names = {weight_of(operations[output]): group for group, output in expected(architecture, set(operations))}
    norms = (name for name in architecture.tensor_shapes() if "norm" in name)
    return names | {mil_name((name,)): (name,) for name in norms}


def escapes(path: Path) -> Iterator[str]:
    """Items of Manifest.json and weight files of the program."""
    root, paths = items(path)
    for item in paths.values():
        if why := outside(path / "Data", item):
            yield f"{path.name}/Manifest.json: item {item!r} {why}"
    if outside(path / "Data", root) is None:
        for file in blob_files(path):
            if why := outside(path / "Data" / Path(root).parent, file.removeprefix(MODEL_PATH)):
                yield f"{path.name}/Data/{root}: weight file {file!r} {why}"


def blob_files(path: Path) -> list[str]:
    """Every weight file the program names."""
    _, spec = parse(path)
    operations = (op for function in spec.mlProgram.functions.values() for op in all_operations(function))
    every = (value.blobFileValue.fileName for op in operations for _, value in values(op))
    return sorted({name for name in every if name})


def structure(path: Path) -> Iterator[str]:
    """Items and constants that are not there in full."""
    _, paths = items(path)
    for item in paths.values():
        if not (path / "Data" / item).exists():
            yield f"{path.name}/Data/{item}: missing"
    model, spec = parse(path)
    operations = (op for function in spec.mlProgram.functions.values() for op in all_operations(function))
    for op in operations:
        for _, value in values(op):
            if value.WhichOneof("value") == "blobFileValue" and (why := misplaced(value, model.parent)):
                yield f"{path.name}: {op.outputs[0].name}: {why}"


def misplaced(value: Any, folder: Path) -> str | None:
    """Why a constant cannot be read: its 64-byte record (magic, dtype, size, position) or its bytes are not there."""
    name, offset = value.blobFileValue.fileName.removeprefix(MODEL_PATH), value.blobFileValue.offset
    file, wanted = folder / name, size(dtype_of(value), shape_of(value))
    if not file.is_file():
        return f"{name} is missing"
    with file.open("rb") as opened:
        opened.seek(offset)
        record = opened.read(64)
    marker, length, position = (int.from_bytes(record[a:b], "little") for a, b in ((0, 4), (8, 16), (16, 24)))
    if len(record) < 64 or marker != 0xDEADBEEF:
        return f"no constant at offset {offset} of {name}"
    if length != wanted:
        return f"{length} bytes in {name}, its shape takes {wanted}"
    return None if position + length <= file.stat().st_size else f"{name} ends before it"
