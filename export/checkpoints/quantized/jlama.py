"""Jlama's quantized weights (JQ4, and its 8-bit variant) in a Hugging Face folder, dequantized.

Format: Jlama `tensor/Q4ByteBufferTensor.java` and `safetensors/SafeTensorSupport.java`. Every weight X of type `Q4` or
`I8` has its scales in `X.qb`, float32 [N, K/32], which may be negative. Of 32 values along K, byte j of a Q4 block
holds the j-th in the low nibble and the (j + 16)-th in the high one: (code − 8) · scale. Embedding and head are
quantized too, norms are not and may have a leading dimension of 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from export.checkpoints import safetensors
from export.checkpoints.integers import Integers
from export.checkpoints.safetensors import Tensor
from export.errors import ExportError

_SCALES = ".qb"
_BLOCK = 32
_BITS = {"Q4": 4, "I8": 8}
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_ELEMENTS_AT_A_TIME = 2**22
"""Dequantized at a time."""


def is_jlama(folder: Path) -> bool:
    """Whether the header names scales; a file without a readable header is reported by the reader that opens it."""
    path = folder / "model.safetensors"
    try:
        return path.is_file() and f'{_SCALES}"'.encode() in safetensors.raw_header(path)
    except (safetensors.BrokenError, OSError):
        return False


@dataclass(frozen=True)
class _JlamaWeights:
    """`model.safetensors` as Jlama's `quantize` writes it."""

    path: Path
    tensors: Mapping[str, Tensor]
    notes = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def description(self) -> str:
        """`Jlama Q4, 15 of 20 tensors quantized`."""
        kinds = [tensor.dtype for tensor in self.tensors.values() if tensor.dtype in _BITS]
        return f"Jlama {' and '.join(sorted(set(kinds)))}, {len(kinds)} of {len(self.shapes)} tensors quantized"

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: _plain_shape(tensor) for name, tensor in self.tensors.items() if not name.endswith(_SCALES)}

    def integers(self, name: str) -> Integers | None:
        """About half of the scales are negative."""
        tensor = self.tensors[name]
        if tensor.dtype not in _BITS:
            return None
        codes, scales = self._blocks(name)
        qdata = _unpacked(codes, tensor.dtype).view(*tensor.shape)
        return Integers(qdata, scales.squeeze(-1), _BITS[tensor.dtype])

    def read(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        if tensor.dtype in _FLOATS:
            stored = torch.from_numpy(self._bytes(tensor)).view(_FLOATS[tensor.dtype])
            return stored.view(self.shapes[name]).to(torch.float32, copy=True)
        if tensor.dtype not in _BITS:
            raise ExportError(f"{self.path}: tensor {name:.80} is {tensor.dtype}, which is no weight")
        rows, columns = tensor.shape
        codes, scales = self._blocks(name)
        values = torch.empty(rows, columns // _BLOCK, _BLOCK)
        step = max(1, _ELEMENTS_AT_A_TIME // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            values[part] = _unpacked(codes[part], tensor.dtype)
            values[part] *= scales[part]
        return values.view(rows, columns)

    def _blocks(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 [N, K/32, 16 or 32], scales float32 [N, K/32, 1]."""
        tensor = self.tensors[name]
        rows, columns = tensor.shape
        scales = torch.from_numpy(self._bytes(self.tensors[name + _SCALES])).view(torch.float32)
        codes = torch.from_numpy(self._bytes(tensor))
        return codes.view(rows, columns // _BLOCK, -1), scales.view(rows, columns // _BLOCK, 1)

    def _bytes(self, tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """A tensor's bytes, read, not mapped."""
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            data = np.fromfile(file, np.uint8, tensor.end - tensor.start)
        if len(data) < tensor.end - tensor.start:
            raise ExportError(f"{self.path}: shorter than it was when it was opened; download it again")
        return data


def _unpacked(codes: torch.Tensor, dtype: str) -> torch.Tensor:
    """uint8 [rows, blocks, 16 or 32] → int8 [rows, blocks, 32]."""
    if dtype == "Q4":
        codes = torch.cat([codes & 15, codes >> 4], dim=-1) - 8  # uint8 wraps around
    return codes.view(torch.int8)


def _plain_shape(tensor: Tensor) -> tuple[int, ...]:
    """Jlama holds a vector as one row."""
    one_row = len(tensor.shape) == 2 and tensor.shape[0] == 1 and tensor.dtype not in _BITS
    return tensor.shape[1:] if one_row else tensor.shape


def open_weights(folder: Path) -> _JlamaWeights:
    """Read the header and check every quantized weight against its scales.

    Raises ExportError: damaged, or parts that do not belong together.
    """
    path = folder / "model.safetensors"
    tensors = safetensors.read(path)
    for name, tensor in tensors.items():
        if name.endswith(_SCALES):
            weight = tensors.get(name.removesuffix(_SCALES))
            if weight is None or weight.dtype not in _BITS:
                raise ExportError(f"{path}: tensor {name:.80} holds scales of no quantized tensor; save it again")
        elif tensor.dtype in _BITS:
            _require_scales(path, name, tensor, tensors.get(name + _SCALES))
    return _JlamaWeights(path, tensors)


def _require_scales(path: Path, name: str, tensor: Tensor, scales: Tensor | None) -> None:
    """One float32 for every 32 values along a row."""
    if len(tensor.shape) != 2 or tensor.shape[1] % _BLOCK or not tensor.elements:
        raise ExportError(f"{path}: tensor {name:.80} has shape {list(tensor.shape)}, no rows of blocks of {_BLOCK}")
    if scales is None:
        raise ExportError(
            f"{path}: tensor {name:.80} is {tensor.dtype}, but its scales {name:.80}{_SCALES} are missing"
        )
    expected = (tensor.shape[0], tensor.shape[1] // _BLOCK)
    if (scales.dtype, scales.shape) != ("F32", expected):
        raise ExportError(
            f"{path}: tensor {name:.80}{_SCALES} is {scales.dtype} of shape {list(scales.shape)}, expected F32 of "
            f"{list(expected)}"
        )
