"""A Core ML package on disk: made reproducible, and read back. Knows the names `_mil_llama.py` gives, not its ops."""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.libmilstoragepython import _BlobStorageReader as BlobReader
from coremltools.proto import MIL_pb2, Model_pb2
from numpy.typing import NDArray

from ..errors import ExportError
from ..plan import Architecture
from ..schemes import EMBEDDING, HEAD
from . import StoredWeight
from ._mil_llama import GATE_UP, QKV, mil_name

AUTHOR = "com.apple.CoreML"
MODEL = f"{AUTHOR}/model.mlmodel"
WEIGHTS = f"{AUTHOR}/weights"
FUSED = {"self_attn.q_proj": QKV, "mlp.gate_proj": GATE_UP}
"""First of a fused group → the group, in row order."""


def seal(package: Path, metadata: dict[str, str], license_name: str) -> dict[str, int | float | str]:
    """Replace what coremltools draws at random or from the clock, and count what the package holds.

    coremltools writes the date, protobuf maps in arbitrary order, random identifiers and private file modes.
    """
    spec = read_spec(package)
    about = spec.description.metadata
    about.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    about.userDefined.update(metadata)
    about.license = license_name
    (package / "Data" / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    weights = package / "Data" / WEIGHTS / "weight.bin"
    write_manifest(package, weights)
    for path in (package, *package.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return count(spec, weights)


def write_manifest(package: Path, weights: Path) -> None:
    """Manifest.json with identifiers that follow from the content."""
    digest = hashlib.sha256((package / "Data" / MODEL).read_bytes())
    with weights.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_OID, f"{path} {digest.hexdigest()}")): {
            "author": AUTHOR,
            "description": f"CoreML Model {description}",
            "name": path.rpartition("/")[2],
            "path": path,
        }
        for path, description in ((MODEL, "Specification"), (WEIGHTS, "Weights"))
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": next(iter(entries))}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")


def count(spec: Any, weights: Path) -> dict[str, int | float | str]:
    """What the runtime will find: ops by kind, bytes, copies of the embedding table."""
    operations = block(spec).operations
    ops = Counter(op.type for op in operations)
    integers = [op for op in operations if op.type == "constexpr_blockwise_shift_scale"]
    stored = Counter(data_type(op.inputs["data"].arguments[0].value) for op in integers)
    reader = BlobReader(str(weights))
    tables = {weight_of(op) for op in operations if op.outputs and op.outputs[0].name in ("logits", TABLE)}
    return {
        "ops": sum(count for kind, count in ops.items() if kind != "const"),
        "int4_weights": stored[MIL_pb2.INT4],
        "int8_weights": stored[MIL_pb2.INT8],
        "attention_ops": ops["scaled_dot_product_attention"],
        "state_reads": ops["read_state"],
        "state_writes": ops["write_state"],
        "weight_bin_bytes": weights.stat().st_size,
        "embedding_and_head": "one table" if len(tables) == 1 else "two tables",
        # a GPU may flush these to zero
        "subnormal_scales": sum(subnormal(scales_of(op, reader)) for op in integers),
    }


TABLE = mil_name((EMBEDDING,))


def weight_of(op: Any) -> str:
    """Name of the variable a linear or gather takes its weight from."""
    name: str = op.inputs["weight" if op.type == "linear" else "x"].arguments[0].name
    return name


def subnormal(scales: NDArray[np.float32]) -> int:
    """Scales below fp16's smallest normal number."""
    return int(np.count_nonzero(np.abs(scales) < np.finfo(np.float16).smallest_normal))


def read_spec(package: Path) -> Any:
    """The package's protobuf."""
    spec = Model_pb2.Model()
    spec.ParseFromString((package / "Data" / MODEL).read_bytes())
    return spec


def block(spec: Any) -> Any:
    """The one block of the one function."""
    (specialization,) = spec.mlProgram.functions["main"].block_specializations.values()
    return specialization


def data_type(value: Any) -> int:
    """MIL data type of a stored tensor."""
    kind: int = value.type.tensorType.dataType
    return kind


def stored_weights(package: Path, architecture: Architecture) -> Iterator[StoredWeight]:
    """Integers and scales of every quantized weight, fused projections taken apart, under our names."""
    operations = {op.outputs[0].name: op for op in block(read_spec(package)).operations if op.outputs}
    reader = BlobReader(str(package / "Data" / WEIGHTS / "weight.bin"))
    for names, output in expected(architecture, set(operations)):
        producer = operations[weight_of(operations[output])]
        if producer.type == "constexpr_blockwise_shift_scale":
            yield from unfuse(names, integers_of(producer, reader), scales_of(producer, reader), architecture)


def expected(architecture: Architecture, present: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Groups of our names and the op that computes with them; a group not fused comes one by one."""
    head = [] if architecture.tie_word_embeddings else [((HEAD,), "logits")]
    rotations = [((name,), mil_name((name,))) for name in architecture.rotation_shapes()]
    groups = [((EMBEDDING,), TABLE), *head, *rotations, *linear_groups(architecture, present)]
    for names, output in groups:
        if output not in present:
            raise ExportError(f"model.mlpackage: no operation {output!r} for {names[0]}; build the artifact again")
        yield names, output


def linear_groups(architecture: Architecture, present: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The linears of all layers, fused where the package fuses them."""
    remaining = list(architecture.linear_shapes())
    while remaining:
        prefix, kind = split_name(remaining[0])
        fused = tuple(f"{prefix}{part}.weight" for part in FUSED.get(kind, (kind,)))
        names = fused if mil_name(fused) in present else (remaining[0],)
        yield names, mil_name(names)
        remaining = [name for name in remaining if name not in names]


def split_name(name: str) -> tuple[str, str]:
    """`model.layers.0.mlp.gate_proj.weight` → (`model.layers.0.`, `mlp.gate_proj`)."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[:3]) + ".", ".".join(parts[3:])


def unfuse(
    names: tuple[str, ...], integers: NDArray[np.int8], scales: NDArray[np.float32], architecture: Architecture
) -> Iterator[StoredWeight]:
    """Take stacked rows apart."""
    shapes, row = architecture.tensor_shapes(), 0
    for name in names:
        end = row + shapes[name][0]
        yield StoredWeight(name, integers[row:end], scales[row:end])
        row = end


def integers_of(constexpr: Any, reader: Any) -> NDArray[np.int8]:
    """The integers [N, K] of a quantized weight; int4 comes as one int8 each."""
    value = constexpr.inputs["data"].arguments[0].value
    read = {MIL_pb2.INT4: reader.read_int4_data, MIL_pb2.INT8: reader.read_int8_data}.get(data_type(value))
    if read is None:
        raise ExportError(f"model.mlpackage: {constexpr.outputs[0].name} is neither int4 nor int8; build it again")
    integers: NDArray[np.int8] = np.asarray(read(value.blobFileValue.offset), np.int8).reshape(shape_of(value))
    return integers


def scales_of(constexpr: Any, reader: Any) -> NDArray[np.float32]:
    """The scales [N, K / group] of a quantized weight."""
    value = constexpr.inputs["scale"].arguments[0].value
    if value.WhichOneof("value") == "immediateValue":  # fewer than ten numbers
        raw = np.frombuffer(value.immediateValue.tensor.bytes.values, np.float16)
    else:
        raw = np.asarray(reader.read_fp16_data(value.blobFileValue.offset)).view(np.float16)
    scales: NDArray[np.float32] = raw.reshape(shape_of(value)).astype(np.float32)
    return scales


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a stored tensor."""
    return tuple(dimension.constant.size for dimension in value.type.tensorType.dimensions)
