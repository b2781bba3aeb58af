"""Blocks of a GGUF file that are symmetric integers already: Q4_0, Q8_0 and Q6_K, as they stand in the file.

    Q4_0    d float16, 16 bytes: value j in the low nibble of byte j, value j + 16 in the high one    (code − 8) · d
    Q8_0    d float16, 32 int8                                                                        code · d
    Q6_K    low four bits, high two bits, 16 int8 scales s, d float16; 256 values in groups of 16     (code − 32) · s·d

Format: ggml `ggml-common.h` (block_q4_0, block_q8_0, block_q6_K) and `dequantize_row_*` in ggml-quants.c. Q6_K's
integers come from the `gguf` library's dequantization with every scale set to one, which is their definition.
"""

from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from .integers import Integers, Unfit

Q4_0, Q8_0, Q6_K = (GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "Q6_K"))
BITS = {Q4_0: 4, Q8_0: 8, Q6_K: 6}
FLOATS = ("F32", "F16", "BF16", "F64")
HALF = 2
"""Bytes of a float16."""
Q6_K_BYTES, Q6_K_SCALES = 210, 192
"""A block, and where in it its 16 scales begin; d follows them."""
Q6_K_GROUPS = 16
ROWS_AT_A_TIME = 2**22


def integers_of(data: NDArray[Any], kind: GGMLQuantizationType) -> Integers | Unfit | None:
    """Rows of blocks as uint8 [N, bytes] → int8 [N, K] and float32 scales; Unfit: another type; None: floats."""
    if kind.name in FLOATS:
        return None
    if kind not in BITS:
        return Unfit(f"{kind.name} blocks, which have minima or uneven levels")
    step = max(1, ROWS_AT_A_TIME // data.shape[1])
    parts = [unpacked(data[start : start + step], kind) for start in range(0, len(data), step)]
    qdata, scale = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return Integers(qdata, scale, BITS[kind])


def unpacked(rows: NDArray[np.uint8], kind: GGMLQuantizationType) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Some rows."""
    count = len(rows)
    if kind == Q6_K:
        blocks = rows.reshape(-1, Q6_K_BYTES)
        scales = np.ascontiguousarray(blocks[:, Q6_K_SCALES : Q6_K_SCALES + Q6_K_GROUPS]).view(np.int8)
        d = np.ascontiguousarray(blocks[:, -HALF:]).view(np.float16).astype(np.float32)
        units = blocks.copy()
        units[:, Q6_K_SCALES : Q6_K_SCALES + Q6_K_GROUPS] = 1
        units[:, -HALF:] = np.array([1], np.float16).view(np.uint8)
        codes = dequantize(units, kind).astype(np.int8)
        return codes.reshape(count, -1), (d * scales.astype(np.float32)).reshape(count, -1)
    blocks = rows.reshape(-1, HALF + (16 if kind == Q4_0 else 32))
    d = np.ascontiguousarray(blocks[:, :HALF]).view(np.float16).astype(np.float32)
    packed = np.ascontiguousarray(blocks[:, HALF:])
    if kind == Q8_0:
        codes = packed.view(np.int8)
    else:
        codes = np.concatenate([packed & 15, packed >> 4], axis=1).view(np.int8) - np.int8(8)
    return codes.reshape(count, -1), d.reshape(count, -1)
