"""A Core ML package on disk: made reproducible, and its weights read back by the names that `graph.py` gives."""

import hashlib
import math
import struct
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.architecture import EMBEDDING, GATE_UP, HEAD, QKV, Architecture
from export.errors import ExportError
from export.formats import StoredWeight, split_weights
from export.host.digests import sha256

from . import MODEL, WEIGHTS, listing, mil_name
from .messages import MIL_pb2, Model_pb2

_TABLE = mil_name((EMBEDDING,))
_FUSED = {QKV[0]: QKV, GATE_UP[0]: GATE_UP}
"""First weight of a fused group → all of the group, in row order."""
_RECORD, _MARKER = struct.Struct("<IIQQ"), 0xDEADBEEF
_Bytes = NDArray[np.uint8]


def seal(package: Path, metadata: dict[str, str], license_name: str) -> dict[str, int | float | str]:
    """Make a package reproducible and count its contents.

    coremltools writes the date, protobuf maps in arbitrary order and random identifiers.
    """
    spec = _read_spec(package)
    about = spec.description.metadata
    about.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    about.userDefined.update(metadata)
    about.license = license_name
    (package / "Data" / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    weights = package / "Data" / WEIGHTS / "weight.bin"
    _write_manifest(package, weights)
    return _count(spec, weights)


def _write_manifest(package: Path, weights: Path) -> None:
    """Write Manifest.json with identifiers derived from the contents."""
    digest = hashlib.sha256((package / "Data" / MODEL).read_bytes())
    digest.update(bytes.fromhex(sha256(weights)))
    model, weights_id = (
        str(uuid.uuid5(uuid.NAMESPACE_OID, f"{path} {digest.hexdigest()}")) for path in (MODEL, WEIGHTS)
    )
    (package / "Manifest.json").write_text(listing(model, weights_id), encoding="utf-8")


def _count(spec: Any, weights: Path) -> dict[str, int | float | str]:
    """Operations by kind, bytes, copies of the embedding table."""
    operations = _block(spec).operations
    ops = Counter(op.type for op in operations)
    integers = [op for op in operations if op.type == "constexpr_blockwise_shift_scale"]
    stored = Counter(data_type(op.inputs["data"].arguments[0].value) for op in integers)
    stored_bytes = np.memmap(weights, np.uint8, mode="r")
    tables = {weight_of(op) for op in operations if op.outputs and op.outputs[0].name in ("logits", _TABLE)}
    return {
        "ops": sum(count for kind, count in ops.items() if kind != "const"),
        "int4_weights": stored[MIL_pb2.INT4],
        "int8_weights": stored[MIL_pb2.INT8],
        "attention_ops": ops["scaled_dot_product_attention"] + ops["softmax"],
        "state_reads": ops["read_state"],
        "state_writes": ops["write_state"],
        "weight_bin_bytes": weights.stat().st_size,
        "embedding_and_head": "one table" if len(tables) == 1 else "two tables",
        # a GPU may flush these to zero
        "subnormal_scales": sum(_subnormal(_scales_of(op, stored_bytes)) for op in integers),
    }


def weight_of(op: Any) -> str:
    """Name of the variable that holds the weight of a linear or gather."""
    name: str = op.inputs["weight" if op.type == "linear" else "x"].arguments[0].name
    return name


def _subnormal(scales: NDArray[np.float32]) -> int:
    """How many scales are below fp16's smallest normal number."""
    return int(np.count_nonzero(np.abs(scales) < np.finfo(np.float16).smallest_normal))


def _read_spec(package: Path) -> Any:
    spec = Model_pb2.Model()
    spec.ParseFromString((package / "Data" / MODEL).read_bytes())
    return spec


def _block(spec: Any) -> Any:
    (specialization,) = spec.mlProgram.functions["main"].block_specializations.values()
    return specialization


def data_type(value: Any) -> int:
    """MIL data type of a stored tensor."""
    kind: int = value.type.tensorType.dataType
    return kind


def read_weights(package: Path, architecture: Architecture) -> Iterator[StoredWeight]:
    """Every quantized weight under the checkpoint's name, fused projections split."""
    operations = {op.outputs[0].name: op for op in _block(_read_spec(package)).operations if op.outputs}
    shapes = architecture.tensor_shapes()
    stored_bytes = np.memmap(package / "Data" / WEIGHTS / "weight.bin", np.uint8, mode="r")
    for names, output in expected(architecture, set(operations)):
        producer = operations[weight_of(operations[output])]
        if producer.type == "constexpr_blockwise_shift_scale":
            rows = {name: shapes[name][0] for name in names}
            yield from split_weights(_integers_of(producer, stored_bytes), _scales_of(producer, stored_bytes), rows)


def expected(architecture: Architecture, present: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names of the weights that one op computes with, and that op's name. Raises ExportError if it is not `present`."""
    head = [] if architecture.tie_word_embeddings else [((HEAD,), "logits")]
    rotations = [((name,), mil_name((name,))) for name in architecture.rotation_shapes()]
    groups = [((EMBEDDING,), _TABLE), *head, *rotations, *linear_groups(architecture, present)]
    for names, output in groups:
        if output not in present:
            raise ExportError(f"model.mlpackage: no operation {output!r} for {names[0]}; build the artifact again")
        yield names, output


def linear_groups(architecture: Architecture, present: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The linears of all layers, as groups where the package fuses them."""
    remaining = list(architecture.linear_shapes())
    while remaining:
        prefix, kind = _split_name(remaining[0])
        fused = tuple(f"{prefix}{part}.weight" for part in _FUSED.get(kind, (kind,)))
        names = fused if mil_name(fused) in present else (remaining[0],)
        yield names, mil_name(names)
        remaining = [name for name in remaining if name not in names]


def _split_name(name: str) -> tuple[str, str]:
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[:3]) + ".", ".".join(parts[3:])


def _integers_of(constexpr: Any, stored_bytes: _Bytes) -> NDArray[np.int8]:
    """The integers [N, K] of a quantized weight, int4 as int8."""
    value = constexpr.inputs["data"].arguments[0].value
    if data_type(value) not in (MIL_pb2.INT4, MIL_pb2.INT8):
        raise ExportError(f"model.mlpackage: {constexpr.outputs[0].name} is neither int4 nor int8; build it again")
    packed = _blob(stored_bytes, value.blobFileValue.offset).view(np.int8)
    if data_type(value) == MIL_pb2.INT4:  # the first of two in the low half
        packed = np.stack([packed << 4 >> 4, packed >> 4], axis=1).ravel()
    return packed[: math.prod(shape_of(value))].reshape(shape_of(value))


def _scales_of(constexpr: Any, stored_bytes: _Bytes) -> NDArray[np.float32]:
    """The scales [N, K / group] of a quantized weight, fp16 as float32."""
    value = constexpr.inputs["scale"].arguments[0].value
    if value.WhichOneof("value") == "immediateValue":  # fewer than ten numbers
        raw = np.frombuffer(value.immediateValue.tensor.bytes.values, np.float16)
    else:
        raw = _blob(stored_bytes, value.blobFileValue.offset).view(np.float16)
    scales: NDArray[np.float32] = raw.reshape(shape_of(value)).astype(np.float32)
    return scales


def _blob(stored_bytes: _Bytes, offset: int) -> _Bytes:
    """A constant of weight.bin: at `offset` a record of 64 bytes has a marker, its type, size and position."""
    marker, _, size, position = _RECORD.unpack_from(stored_bytes.data, offset)
    if marker != _MARKER or position + size > len(stored_bytes):
        raise ExportError(f"weight.bin: no whole constant at offset {offset}; build the artifact again")
    return np.asarray(stored_bytes[position : position + size])


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a stored tensor, from its MIL value."""
    return tuple(dimension.constant.size for dimension in value.type.tensorType.dimensions)
