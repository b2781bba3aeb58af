"""A saved Core ML package, read from its bytes: operations, types, constants.

Written from Apple's formats (MIL.proto, the layout of weight.bin) and without code of `export/formats` that writes or
reads packages, so that it finds errors in packages written there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.formats.mlpackage.messages import MIL_pb2, Model_pb2


class PackageError(Exception):
    """A package cannot be evaluated; one line that names the file or operation."""


@dataclass(frozen=True)
class Literal:
    """A constant: a tensor, or a string."""

    value: Tensor | str


@dataclass(frozen=True)
class Operation:
    """One operation of the program."""

    kind: str
    name: str
    inputs: Mapping[str, tuple[str | Literal, ...]]
    """Parameter → names of variables, or constants written in place."""
    outputs: tuple[tuple[str, torch.dtype], ...]
    """Variables, and the dtypes that the program declares for them."""


@dataclass(frozen=True)
class Program:
    """The one function of a package."""

    inputs: Mapping[str, torch.dtype]
    states: Mapping[str, tuple[int, ...]]
    """Shapes; Core ML states are always fp16."""
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    """One MIL data type: in torch, in numpy, its code in weight.bin, its bits there."""

    torch_type: torch.dtype
    numpy_type: type[np.generic]
    code: int
    bits: int


_KINDS = {
    MIL_pb2.BOOL: _Kind(torch.bool, np.bool_, -1, 8),
    MIL_pb2.FLOAT16: _Kind(torch.float16, np.float16, 1, 16),
    MIL_pb2.FLOAT32: _Kind(torch.float32, np.float32, 2, 32),
    MIL_pb2.UINT8: _Kind(torch.uint8, np.uint8, 3, 8),
    MIL_pb2.INT8: _Kind(torch.int8, np.int8, 4, 8),
    MIL_pb2.INT16: _Kind(torch.int16, np.int16, 6, 16),
    MIL_pb2.UINT16: _Kind(torch.int32, np.uint16, 7, 16),  # torch computes little in uint16; the values are the same
    MIL_pb2.INT4: _Kind(torch.int8, np.uint8, 8, 4),
    MIL_pb2.INT32: _Kind(torch.int32, np.int32, 14, 32),
}


def load(package: Path) -> Program:
    """Read a `.mlpackage`; weights stay memory-mapped until they are used. Raises PackageError."""
    model = _model_file(package)
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(model.read_bytes())
        (function,) = spec.mlProgram.functions.values()
        (block,) = function.block_specializations.values()
    except Exception as error:
        raise PackageError(f"{model}: not an ML program of one function ({error})") from None
    states = {value.name: value.type for value in function.inputs if value.type.HasField("stateType")}
    return Program(
        inputs={value.name: _dtype_of(value.type) for value in function.inputs if value.name not in states},
        states={name: _shape_of(kind.stateType.wrappedType.tensorType) for name, kind in states.items()},
        operations=tuple(_operation(op, package, model.parent) for op in block.operations),
        outputs=tuple(block.outputs),
    )


def _model_file(package: Path) -> Path:
    """The model file in Manifest.json; items outside the package, which coremltools would open, are refused."""
    try:
        manifest = json.loads((package / "Manifest.json").read_bytes())
        paths = {key: entry["path"] for key, entry in manifest["itemInfoEntries"].items()}
        root: str = paths[manifest["rootModelIdentifier"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{package}: Manifest.json is missing or damaged ({error!r})") from None
    for path in paths.values():
        _inside(package, package / "Data" / path)
    return package / "Data" / root


def _inside(package: Path, path: Path) -> Path:
    """The path. Raises PackageError unless it exists below the package."""
    if not path.resolve().is_relative_to(package.resolve()):
        raise PackageError(f"{package}: an item points outside the package ({path.relative_to(package)}); refused")
    if not path.exists():
        raise PackageError(f"{path}: missing")
    return path


def _operation(op: Any, package: Path, folder: Path) -> Operation:
    """One operation; a `const` carries its value as the input `val`."""
    name = op.attributes["name"].immediateValue.tensor.strings.values[0]
    if op.blocks:
        raise PackageError(f"operation {name} ({op.type}): control flow is not supported")
    try:
        inputs: dict[str, tuple[str | Literal, ...]] = {
            parameter: tuple(
                Literal(_constant(binding.value, package, folder)) if binding.HasField("value") else binding.name
                for binding in argument.arguments
            )
            for parameter, argument in op.inputs.items()
        }
        if op.type == "const":
            inputs = {"val": (Literal(_constant(op.attributes["val"], package, folder)),)}
    except KeyError as error:
        raise PackageError(f"operation {name} ({op.type}): a constant of unsupported type {error}") from None
    outputs = tuple((value.name, _dtype_of(value.type)) for value in op.outputs)
    return Operation(op.type, name, inputs, outputs)


def _dtype_of(value_type: Any) -> torch.dtype:
    """Declared element type; a string has none and counts as bool, which has no effect."""
    kind = _KINDS.get(value_type.tensorType.dataType)
    return torch.bool if kind is None else kind.torch_type


def _shape_of(tensor_type: Any) -> tuple[int, ...]:
    return tuple(dimension.constant.size for dimension in tensor_type.dimensions)


def _constant(value: Any, package: Path, folder: Path) -> Tensor | str:
    """A constant from the program itself or from weight.bin."""
    if value.type.tensorType.dataType == MIL_pb2.STRING:
        text: str = value.immediateValue.tensor.strings.values[0]
        return text
    kind, shape = _KINDS[value.type.tensorType.dataType], _shape_of(value.type.tensorType)
    if value.WhichOneof("value") == "immediateValue":
        values = _immediate(value.immediateValue.tensor, kind).reshape(shape).copy()
        return torch.from_numpy(values).to(kind.torch_type)
    # `@model_path` is the folder of the model file
    path = folder / value.blobFileValue.fileName.removeprefix("@model_path/")
    return _blob(_inside(package, path), value.blobFileValue.offset, kind, shape)


def _immediate(tensor: Any, kind: _Kind) -> NDArray[np.generic]:
    """Values in the program; 16-bit types are stored as bytes."""
    which = tensor.WhichOneof("value")
    values = getattr(tensor, which).values
    if which == "bytes":
        return np.frombuffer(values, kind.numpy_type)
    return np.array(values, kind.numpy_type)


def _blob(path: Path, offset: int, kind: _Kind, shape: tuple[int, ...]) -> Tensor:
    """A tensor of weight.bin: at `offset`, 64 bytes hold marker, type code, size and position of the data."""
    file = np.memmap(path, np.uint8, mode="c")  # copy on write: torch requires writable memory, the file stays the same
    header = file[offset : offset + 64].tobytes()
    marker, code = np.frombuffer(header[:8], np.uint32)
    size, position = np.frombuffer(header[8:24], np.uint64)
    count = int(np.prod(shape))
    if marker != 0xDEADBEEF or code != kind.code or size != (count * kind.bits + 7) // 8:
        raise PackageError(f"{path}: no {kind.numpy_type.__name__} tensor of shape {shape} at offset {offset}")
    if position + size > file.size:
        raise PackageError(f"{path}: truncated; the tensor at offset {offset} ends after the file")
    raw = file[int(position) : int(position + size)]
    if kind.bits == 4:
        return signed_nibbles(torch.from_numpy(raw), count).reshape(shape)
    return torch.from_numpy(raw.view(kind.numpy_type)).reshape(shape).to(kind.torch_type)


def signed_nibbles(packed: Tensor, count: int) -> Tensor:
    """int4 values from uint8 bytes, the first of a pair in the low half, as int8 [count]."""
    low = (packed << 4).view(torch.int8) >> 4
    high = packed.view(torch.int8) >> 4
    return torch.stack([low, high], dim=1).flatten()[:count]
