"""Weights in and out of model.onnx.data: our integers in MatMulNBits' layout.

Layout: `NAME.q` uint8 [N, blocks, block · bits / 8], codes offset by 2^(bits-1) so that no zero points are needed, of
two 4-bit codes the even column in the low nibble; `NAME.scale` [N, groups] in the shortest of bfloat16, float16 and
float32 that holds them exactly: bfloat16, except for a checkpoint's own. The graph casts them to float32 and, for a
per-channel scheme, repeats a row's one scale for each of its blocks, since onnxruntime's blocks are at most 256 wide.
MatMulBnb4 takes codes of NF4 and FP4 in the same shape, the even column in the high nibble.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper

from export.architecture import GATE_UP, QKV, Architecture
from export.checkpoints.integers import Integers
from export.errors import ExportError
from export.formats import StoredWeight, split_weights
from export.plan import Levels, WeightScheme

from . import FILE, block_size

BNB4_TYPES: dict[Levels, int] = {"fp4": 0, "nf4": 1}
"""MatMulBnb4's quant_type."""
_LEVELS_OF = {number: levels for levels, number in BNB4_TYPES.items()}
_STACKED = {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": GATE_UP}
"""Name of a stacked matrix → the linears whose rows it holds."""
_PAGE = 4096
PASSED_ON = {"Cast", "Expand", "Reshape"}
"""Operators between stored scales or weights and the node that uses them."""


@dataclass(frozen=True)
class Codes:
    """One quantized matrix [N, K], or several stacked, as initializers."""

    q: str
    scale: str
    rows: int
    columns: int
    bits: int
    block: int
    per_channel: bool
    """One stored scale per row."""
    levels: Levels

    @property
    def blocks(self) -> int:
        return self.columns // self.block


class DataFile:
    """Initializers, each written to the data file when it is added, so that memory holds one tensor at a time."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self.file = file
        self.location = location
        self.tensors: list[Any] = []

    def add(self, name: str, values: NDArray[Any]) -> str:
        """Append one array and return its name; arrays of a page or more start on a page, to be memory-mapped."""
        alignment = _PAGE if values.nbytes >= _PAGE else 64
        offset = -(-self.file.tell() // alignment) * alignment
        self.file.write(bytes(offset - self.file.tell()))
        self.file.write(np.ascontiguousarray(values).view(np.uint8).data)
        tensor = TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(values.dtype))
        tensor.raw_data = b""  # set_external_data requires the field; the bytes are in the data file
        external_data_helper.set_external_data(tensor, self.location, offset=offset, length=values.nbytes)
        tensor.ClearField("raw_data")
        self.tensors.append(tensor)
        return name

    def add_codes(self, name: str, weights: Sequence[Integers], scheme: WeightScheme, *, common_scales: bool) -> Codes:
        """Append quantized matrices of one scheme, stacked along their rows.

        Raises ExportError: a scale is not a bfloat16 although the recipe chooses only such scales (`common_scales`).
        """
        columns = weights[0].qdata.shape[1]
        block = block_size(scheme, columns)
        packed = [
            pack(weight.qdata.numpy(), scheme.bits, scheme.levels).reshape(len(weight.qdata), columns // block, -1)
            for weight in weights
        ]
        q = self.add(f"{name}.q", packed[0] if len(packed) == 1 else np.concatenate(packed))
        scale = self.add(f"{name}.scale", shortest(torch.cat([weight.scale for weight in weights]), common_scales))
        rows = sum(len(part) for part in packed)
        return Codes(q, scale, rows, columns, scheme.bits, block, not scheme.group_size, scheme.levels)


def shortest(scale: torch.Tensor, common: bool) -> NDArray[Any]:
    """float32 scales in the shortest type that holds them exactly. Raises ExportError: `common`, and no bfloat16."""
    brain = scale.to(torch.bfloat16)
    if torch.equal(brain.float(), scale):
        bits = brain.contiguous().view(torch.int16).numpy()
        return bits.view(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    if common:
        raise ExportError("a scale is not a bfloat16; scales are rounded before the integers are chosen")
    half = scale.to(torch.float16)
    return (half if torch.equal(half.float(), scale) else scale).contiguous().numpy()


def pack(codes: NDArray[np.int8], bits: int, levels: Levels) -> NDArray[np.uint8]:
    """Signed codes [N, K] → offset codes [N, K · bits / 8], in the nibble order of `levels`."""
    if bits == 8:
        return codes.view(np.uint8) ^ np.uint8(0x80)
    unsigned = codes.view(np.uint8) + np.uint8(8)  # wraps around: -8…7 becomes 0…15
    even, odd = unsigned[:, 0::2], unsigned[:, 1::2]
    low, high = (even, odd) if levels == "even" else (odd, even)
    return low | high << np.uint8(4)


def unpack(packed: NDArray[np.uint8], bits: int, levels: Levels) -> NDArray[np.int8]:
    """The inverse of `pack`."""
    if bits == 8:
        return (packed ^ np.uint8(0x80)).view(np.int8)
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    low, high = packed & 15, packed >> 4
    codes[:, 0::2], codes[:, 1::2] = (low, high) if levels == "even" else (high, low)
    return codes - np.int8(8)


class StoredTensors:
    """The initializers of a finished file, memory-mapped one at a time."""

    def __init__(self, tensors: Sequence[Any], folder: Path) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.folder = folder

    def read(self, name: str) -> NDArray[Any]:
        """A read-only view of one initializer."""
        tensor = self.tensors[name]
        external = external_data_helper.ExternalDataInfo(tensor)
        path, dtype = self.folder / external.location, helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if path.stat().st_size < external.offset + external.length:
            raise ExportError(f"{path}: ends before {name}; build the artifact again")
        return np.memmap(path, dtype, "r", external.offset, tuple(tensor.dims))

    def weight(self, codes: Codes) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Integers [N, K] and scales [N, groups] of one stored matrix; per channel: one column."""
        qdata = unpack(self.read(codes.q).reshape(codes.rows, -1), codes.bits, codes.levels)
        return qdata, self.read(codes.scale).astype(np.float32)


def read_weights(artifact: Path, architecture: Architecture) -> Iterator[StoredWeight]:
    """Every quantized weight of a model.onnx (or of its folder), memory-mapped, under the checkpoint's name."""
    path = artifact / FILE if artifact.is_dir() else artifact
    graph = onnx.load(path, load_external_data=False).graph
    tensors = StoredTensors(graph.initializer, path.parent)
    makers = {output: node for node in graph.node for output in node.output}
    seen = set()
    for node in graph.node:
        codes = codes_of(node, tensors, makers)
        if codes and codes.q not in seen:
            seen.add(codes.q)
            yield from split_weights(*tensors.weight(codes), rows_of(codes, architecture))


def codes_of(node: Any, tensors: StoredTensors, makers: Mapping[str, Any]) -> Codes | None:
    """The quantized matrix that a node multiplies with or gathers from; None for other nodes."""
    attributes = {entry.name: entry.i for entry in node.attribute}
    levels: Levels = "even"
    if node.op_type in {"MatMulNBits", "MatMulBnb4"}:
        q, scale, rows, columns = node.input[1], node.input[2], attributes["N"], attributes["K"]
    elif node.op_type == "GatherBlockQuantized":
        q, scale = node.input[0], node.input[2]
        rows, blocks, _ = tensors.tensors[q].dims
        columns = blocks * attributes["block_size"]
    else:
        return None
    if node.op_type == "MatMulBnb4":
        levels = _LEVELS_OF[attributes["quant_type"]]
    stored = _stored_scale(scale, makers)
    per_channel = tensors.tensors[stored].dims[1] == 1
    bits, block = attributes.get("bits", 4), attributes["block_size"]
    return Codes(q, stored, rows, columns, bits, block, per_channel, levels)


def _stored_scale(name: str, makers: Mapping[str, Any]) -> str:
    """The initializer from which a node's scales are computed."""
    while name in makers:
        maker = makers[name]
        if maker.op_type not in PASSED_ON:
            raise ExportError(f"{name}: scales are computed by {maker.op_type}; build the artifact again")
        name = maker.input[0]
    return name


def rows_of(codes: Codes, architecture: Architecture) -> dict[str, int]:
    """Checkpoint's names of the weights in one stored matrix → their rows."""
    name = codes.q.removesuffix(".q")
    return stacked_rows(name, architecture) or {name: codes.rows}


def stacked_rows(name: str, architecture: Architecture) -> dict[str, int]:
    """Checkpoint's names of the weights in the stacked matrix of that name → their rows; empty if it is one weight."""
    layer, *linear = name.removesuffix(".weight").rsplit(".", 2)
    shapes = architecture.linear_shapes()
    parts = [f"{layer}.{part}.weight" for part in _STACKED.get(".".join(linear), ())]
    return {part: shapes[part][0] for part in parts if part in shapes}
