"""Weights in and out of model.onnx.data: our integers in MatMulNBits' layout. Knows nothing about the graph.

Layout: `NAME.q` uint8 [N, blocks, block · bits / 8], codes offset by 2^(bits-1) so that no zero points are needed, of
two 4-bit codes the even column in the low nibble; `NAME.scale` [N, groups] in the shortest of bfloat16, float16 and
float32 that holds them exactly: bfloat16, but for a checkpoint's own. The graph makes float32 of them, and of a row's
one scale as many as it has blocks (a per-channel scheme has no block size onnxruntime takes). MatMulBnb4 takes codes of
NF4 and FP4 in the same shape, the even column in the high nibble.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper

from ..errors import ExportError
from ..plan import Levels, WeightScheme
from . import StoredWeight

BLOCK_SIZES = (256, 128, 64, 32, 16)
"""What MatMulNBits and GatherBlockQuantized take."""
BLOCKS_PER_CHANNEL = 16
"""At least as many to a row of a per-channel scheme. onnxruntime rounds activations to int8 per block, so an outlier
spoils as many channels as its block has: KL of the head alone on SmolLM2-135M (rows of 576) is 0.0010 with blocks of
32, 0.0020 with 64, 0.0048 with 192. Time hardly depends on it: a head of 128,256 × 2,048 takes 22.4 ms with blocks of
128 and 256, 23.0 with 64, 24.8 with 32."""
BNB4_TYPES: dict[Levels, int] = {"fp4": 0, "nf4": 1}
"""MatMulBnb4's quant_type."""
PAGE = 4096
Stored = tuple[torch.Tensor, torch.Tensor]
"""Codes int8 [N, K] and scales float32 [N, K / group] of one weight."""


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
    """Initializers, each written to the data file as it comes, so memory stays at one tensor."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self.file = file
        self.location = location
        self.tensors: list[Any] = []

    def add(self, name: str, values: NDArray[Any]) -> str:
        """Append one array; tensors of a page or more start on a page, so that they can be memory-mapped."""
        alignment = PAGE if values.nbytes >= PAGE else 64
        offset = -(-self.file.tell() // alignment) * alignment
        self.file.write(bytes(offset - self.file.tell()))
        self.file.write(np.ascontiguousarray(values).view(np.uint8).data)
        tensor = TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(values.dtype))
        tensor.raw_data = b""  # set_external_data wants the field; the bytes are in the data file
        external_data_helper.set_external_data(tensor, self.location, offset=offset, length=values.nbytes)
        tensor.ClearField("raw_data")
        self.tensors.append(tensor)
        return name

    def add_codes(self, name: str, weights: Sequence[Stored], scheme: WeightScheme, *, common_scales: bool) -> Codes:
        """Append quantized matrices of one scheme, stacked along their rows.

        Raises ExportError: a scale that is no bfloat16 where the recipe chooses only such (`common_scales`).
        """
        columns = weights[0][0].shape[1]
        block = block_size(scheme, columns)
        packed = [
            pack(qdata.numpy(), scheme.bits, scheme.levels).reshape(len(qdata), columns // block, -1)
            for qdata, _ in weights
        ]
        q = self.add(f"{name}.q", packed[0] if len(packed) == 1 else np.concatenate(packed))
        scale = self.add(f"{name}.scale", shortest(torch.cat([scale for _, scale in weights]), common_scales))
        rows = sum(len(part) for part in packed)
        return Codes(q, scale, rows, columns, scheme.bits, block, not scheme.group_size, scheme.levels)


def shortest(scale: torch.Tensor, common: bool) -> NDArray[Any]:
    """float32 scales in the shortest type that loses nothing; `common` ones were rounded to bfloat16 already."""
    brain = scale.to(torch.bfloat16)
    if torch.equal(brain.float(), scale):
        bits = brain.contiguous().view(torch.int16).numpy()
        return bits.view(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    if common:
        raise ExportError("a scale is not a bfloat16; scales are rounded before the integers are chosen")
    half = scale.to(torch.float16)
    return (half if torch.equal(half.float(), scale) else scale).contiguous().numpy()


def block_size(scheme: WeightScheme, columns: int) -> int:
    """Columns that share a scale in the file; 0 when onnxruntime has no block that fits."""
    if scheme.group_size:
        return scheme.group_size if scheme.group_size in BLOCK_SIZES else 0
    fitting = [size for size in BLOCK_SIZES if columns % size == 0]
    return next((size for size in fitting if size * BLOCKS_PER_CHANNEL <= columns), min(fitting, default=0))


def pack(codes: NDArray[np.int8], bits: int, levels: Levels) -> NDArray[np.uint8]:
    """Signed codes [N, K] → offset codes [N, K · bits / 8]."""
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
        where = external_data_helper.ExternalDataInfo(tensor)
        path, dtype = self.folder / where.location, helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if path.stat().st_size < where.offset + where.length:
            raise ExportError(f"{path}: ends before {name}; build the artifact again")
        return np.memmap(path, dtype, "r", where.offset, tuple(tensor.dims))

    def weight(self, codes: Codes) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Integers [N, K] and scales [N, groups] of one stored matrix; per channel: one column."""
        qdata = unpack(self.read(codes.q).reshape(codes.rows, -1), codes.bits, codes.levels)
        return qdata, self.read(codes.scale).astype(np.float32)


def split(qdata: NDArray[np.int8], scale: NDArray[np.float32], rows: Mapping[str, int]) -> Iterator[StoredWeight]:
    """Take a stacked matrix apart: name → rows, in order."""
    start = 0
    for name, count in rows.items():
        yield StoredWeight(name, qdata[start : start + count], scale[start : start + count])
        start += count
