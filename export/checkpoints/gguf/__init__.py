"""A GGUF file of architecture `llama` (llama.cpp), read through the `gguf` library once its header is checked.

Three types of blocks are symmetric integers, which are taken as they stand in the file:

    Q4_0    d float16, 16 bytes: value j in the low nibble of byte j, value j + 16 in the high one    (code − 8) · d
    Q8_0    d float16, 32 int8                                                                        code · d
    Q6_K    low four bits, high two bits, 16 int8 scales s, d float16; 256 values in groups of 16     (code − 32) · s·d

Format: ggml `ggml-common.h` (block_q4_0, block_q8_0, block_q6_K) and `dequantize_row_*` in ggml-quants.c. Q6_K's
integers come from the `gguf` library's dequantization with every scale set to one, which is their definition.
"""

import math
import struct
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import NDArray
from pydantic import ValidationError

from export.architecture import EMBEDDING, FINAL_NORM, HEAD, Architecture, RopeScaling
from export.checkpoints.integers import Integers, Unfit, in_hugging_face_order
from export.errors import ExportError, explain
from export.model import scale_frequencies

from . import header, tokenizer
from .header import Metadata

Q4_0, Q8_0, Q6_K = (GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "Q6_K"))
_BITS = {Q4_0: 4, Q8_0: 8, Q6_K: 6}
_ARRAY_HEAD, _STRING_HEAD = struct.Struct("<IQ"), struct.Struct("<Q")
"""Type and number of items; number of bytes."""
_FLOATS = ("F32", "F16", "BF16", "F64")
_HALF = 2
"""Bytes of a float16."""
_Q6_K_BYTES, _Q6_K_SCALES = 210, 192
"""A block, and where in it its 16 scales begin; d follows them."""
_Q6_K_GROUPS = 16
_BYTES_AT_A_TIME = 2**22
NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": HEAD,
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
_ELEMENTS_AT_A_TIME = 2**22
"""Dequantized at a time: the library takes twice the memory of its result."""
# What gguf.quants.dequantize reads. The library has no public list, and refuses a type only when a tensor is read.
READABLE_TYPES = frozenset({
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
    "MXFP4", "NVFP4",
})  # fmt: skip
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0
_TOLERANCE = 1e-5
"""Relative; the table is float32."""


class _Reader(GGUFReader):  # type: ignore[misc]  # of a package without types
    """The library's, for headers that `header.check` has passed; a vocabulary's 200,000 items in a tenth of the time.

    The library looks at each through `memmap` and keeps an array for every number.
    """

    data: Any

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        self.data = np.asarray(self.data)  # of the same memory
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        start = orig_offs + _ARRAY_HEAD.size
        number, count = _ARRAY_HEAD.unpack_from(self.data, orig_offs)
        kind = GGUFValueType(number)
        if kind == GGUFValueType.STRING:
            items, end = self._strings(start, count)
        else:
            items = [self._get(start, self.gguf_scalar_to_np[kind], count)]
            end = start + items[0].nbytes
        return end - orig_offs, items, range(len(items)), [GGUFValueType.ARRAY, *([kind] if count else [])]

    def _strings(self, at: int, count: int) -> tuple[list[NDArray[np.uint8]], int]:
        """The bytes of so many strings, and where they end."""
        items = []
        for _ in range(count):
            (size,) = _STRING_HEAD.unpack_from(self.data, at)
            at += _STRING_HEAD.size
            items.append(self.data[at : at + size])
            at += size
        return items, at


class GgufSource:
    """One GGUF file of architecture `llama`, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        self.notes = ()
        self.stated_ids: Mapping[str, Mapping[str, Any]] = {}
        header.check(path)
        try:
            self._reader = _Reader(path)
        except Exception as error:  # the library raises whatever the damaged bytes lead to
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ExportError(f"{path}: damaged GGUF ({reason}); download it again") from None
        self.metadata = Metadata(path, self._reader)
        self._tensors = {hugging_face_name(tensor.name): tensor for tensor in self._reader.tensors}
        self.description = f"GGUF, {_kinds_of(self._reader.tensors)}, {len(self._tensors)} tensors"
        size = path.stat().st_size
        for tensor in self._reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise ExportError(f"{path}: tensor {tensor.name} ends after the file's {size} bytes; download it again")
            if tensor.tensor_type.name not in READABLE_TYPES:
                raise ExportError(
                    f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}, which cannot be dequantized; "
                    "use a file in F32, F16, BF16 or Q8_0"
                )
        _require_in_order(path, self._reader)

    @cached_property
    def architecture(self) -> Architecture:
        get = self.metadata.get
        self._refuse_other_models()
        heads, hidden = get("llama.attention.head_count", int), get("llama.embedding_length", int)
        head_dim, theta = self._head_dim(hidden, heads), get("llama.rope.freq_base", float, 10000.0)
        try:
            return Architecture(
                vocab_size=self._vocab_size(),
                hidden_size=hidden,
                intermediate_size=get("llama.feed_forward_length", int),
                num_hidden_layers=get("llama.block_count", int),
                num_attention_heads=heads,
                num_key_value_heads=get("llama.attention.head_count_kv", int, heads),
                head_dim=head_dim,
                rope_theta=theta,
                rope_scaling=self._rope_scaling(theta, head_dim),
                # the file stores float32; 1e-5 comes back as 9.99999975e-06
                rms_norm_eps=float(f"{get('llama.attention.layer_norm_rms_epsilon', float):.6g}"),
                tie_word_embeddings=HEAD not in self._tensors,
                max_position_embeddings=get("llama.context_length", int),
            )
        except ValidationError as error:
            raise ExportError(f"{self.path}: {explain(error)}") from None

    def _refuse_other_models(self) -> None:
        """Raises ExportError: something that our model does not compute, or a part of a model."""
        if (kind := self.metadata.get("general.architecture", str)) != "llama":
            raise ExportError(f"{self.path}: general.architecture is {kind!r}; only 'llama' is supported")
        if (kind := self.metadata.get("general.type", str, "model")) != "model":
            raise ExportError(f"{self.path}: general.type is {kind!r}, not a whole model; give the GGUF of the model")
        if (parts := self.metadata.get("split.count", int, 1)) > 1:
            raise ExportError(
                f"{self.path}: one of {parts} parts; join them with `llama-gguf-split --merge` and give the whole file"
            )
        self._refuse_scaled_rope()

    def _refuse_scaled_rope(self) -> None:
        """As llama.cpp a file without a type scales linearly, under a key of today or of 2023; by 1 is not at all."""
        get = self.metadata.get
        kind = get("llama.rope.scaling.type", str, "linear")
        factor = get("llama.rope.scaling.factor", float, get("llama.rope.scale_linear", float, 1.0))
        if kind not in ("none", "linear") or (kind == "linear" and factor not in (0.0, 1.0)):
            raise ExportError(
                f"{self.path}: llama.rope.scaling.type is {kind!r} with factor {factor}; only 'none' is supported"
            )

    def _vocab_size(self) -> int:
        embedding = self.shapes.get(EMBEDDING)
        if not embedding:
            raise ExportError(f"{self.path}: tensor token_embd.weight is missing or a single number")
        return embedding[0]

    def _rope_scaling(self, theta: float, head_dim: int) -> RopeScaling | None:
        """Llama 3's parameters, recovered from the one factor that the file holds for each frequency."""
        tensor = self._tensors.get(ROPE_FACTORS)
        if tensor is None:
            return None
        table = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        try:
            return _scaling_of(table, theta, head_dim)
        except ValueError as error:
            raise ExportError(f"{self.path}: tensor {ROPE_FACTORS} {error}; give a Hugging Face folder") from None

    def _head_dim(self, hidden: int, heads: int) -> int:
        """Channels of a head, all of which must be turned."""
        size = self.metadata.get("llama.attention.key_length", int, hidden // max(heads, 1))
        if (turned := self.metadata.get("llama.rope.dimension_count", int, size)) != size:
            raise ExportError(f"{self.path}: llama.rope.dimension_count is {turned}, but heads have {size} channels")
        return size

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
            if name != ROPE_FACTORS  # part of the architecture
        }

    def read(self, name: str) -> torch.Tensor:
        tensor, shape = self._tensors[name], self.shapes[name]
        values = torch.empty(torch.Size(shape).numel() // shape[-1], shape[-1])  # [rows, columns]
        stored = tensor.data.reshape(len(values), -1)
        step = max(1, _ELEMENTS_AT_A_TIME // shape[-1])
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            values.numpy()[rows] = dequantize(stored[rows], tensor.tensor_type)
        return in_hugging_face_order(name, values.view(shape), self.architecture)

    def integers(self, name: str) -> Integers | Unfit | None:
        tensor, a = self._tensors[name], self.architecture
        integers = integers_of(tensor.data.reshape(self.shapes[name][0], -1), tensor.tensor_type)
        if not isinstance(integers, Integers):
            return integers
        qdata, scale = (in_hugging_face_order(name, part, a) for part in (integers.qdata, integers.scale))
        return Integers(qdata, scale, integers.bits)

    def write_tokenizer(self, folder: Path) -> None:
        tokenizer.write(self.metadata, folder)


def _require_in_order(path: Path, reader: Any) -> None:
    """Tensors follow each other, padded to the alignment, as llama.cpp's `gguf.cpp` demands; none overlap.

    The library adds offsets unchecked: one of 2⁶⁴ − 1 lies before the data.
    """
    at = 0
    for tensor in reader.tensors:
        offset = int(tensor.field.parts[-1][0])
        if offset != at:
            raise ExportError(f"{path}: tensor {tensor.name} begins at {offset}, expected {at}; download it again")
        at += -(-tensor.n_bytes // int(reader.alignment)) * int(reader.alignment)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
    return NAMES.get(name, name)


def _kinds_of(tensors: list[Any]) -> str:
    """Element types of the matrices and how often: `Q4_K (157), Q6_K (29)`."""
    counts = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(counts.items())) or "F32"


def _scaling_of(table: torch.Tensor, theta: float, head_dim: int) -> RopeScaling | None:
    """float32 [head_dim / 2] of slowing factors → the scaling they come from; None where nothing is slowed.

    Raises ValueError: not a table of Llama 3's kind.
    """
    if head_dim < 2 or table.shape != (head_dim // 2,):
        raise ValueError(f"has shape {list(table.shape)}, heads have {head_dim // 2} rotary pairs")
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"goes with a frequency base of {theta}")
    if not (table.isfinite().all() and table.min() > 0 and table.max() < 1e6):
        raise ValueError("holds numbers that are no slowing factors")
    if torch.equal(table, torch.ones_like(table)):
        return None
    plain = theta ** -(torch.arange(0, head_dim, 2) / head_dim)  # radians per position
    factor = float(f"{table.max().item():.6g}")
    # Llama 3 slows long waves by `factor`, short ones not at all, and blends in between: there
    # 1 / table = (1 - blend) / factor + blend, and blend is linear in original length / wavelength. Solved for the
    # length, every blended frequency gives the same one up to float32, so the median is taken and rounded.
    blend = (1 / table.double() - 1 / factor) / (1 - 1 / factor)
    partly = (blend > _TOLERANCE) & (blend < 1 - _TOLERANCE)
    if factor <= 1 or not partly.any():
        raise ValueError("is not Llama 3's RoPE scaling")
    lengths = (blend * (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR) + _LOW_FREQ_FACTOR) * 2 * math.pi / plain
    scaling = RopeScaling(
        factor=factor,
        low_freq_factor=_LOW_FREQ_FACTOR,
        high_freq_factor=_HIGH_FREQ_FACTOR,
        original_max_position_embeddings=max(1, round(lengths[partly].median().item())),
    )
    if ((plain / scale_frequencies(plain, scaling) - table).abs() > _TOLERANCE * table).any():
        raise ValueError("is not Llama 3's RoPE scaling")
    return scaling


def integers_of(data: NDArray[Any], kind: GGMLQuantizationType) -> Integers | Unfit | None:
    """Rows of blocks as uint8 [N, bytes] → int8 [N, K] and float32 scales; Unfit: another type; None: floats."""
    if kind.name in _FLOATS:
        return None
    if kind not in _BITS:
        return Unfit(f"{kind.name} blocks, which have minima or uneven levels")
    step = max(1, _BYTES_AT_A_TIME // data.shape[1])
    parts = [_unpacked(data[start : start + step], kind) for start in range(0, len(data), step)]
    qdata, scale = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return Integers(qdata, scale, _BITS[kind])


def _unpacked(rows: NDArray[np.uint8], kind: GGMLQuantizationType) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    count = len(rows)
    if kind == Q6_K:
        blocks = rows.reshape(-1, _Q6_K_BYTES)
        scales = np.ascontiguousarray(blocks[:, _Q6_K_SCALES : _Q6_K_SCALES + _Q6_K_GROUPS]).view(np.int8)
        d = np.ascontiguousarray(blocks[:, -_HALF:]).view(np.float16).astype(np.float32)
        units = blocks.copy()
        units[:, _Q6_K_SCALES : _Q6_K_SCALES + _Q6_K_GROUPS] = 1
        units[:, -_HALF:] = np.array([1], np.float16).view(np.uint8)
        codes = dequantize(units, kind).astype(np.int8)
        return codes.reshape(count, -1), (d * scales.astype(np.float32)).reshape(count, -1)
    blocks = rows.reshape(-1, _HALF + (16 if kind == Q4_0 else 32))
    d = np.ascontiguousarray(blocks[:, :_HALF]).view(np.float16).astype(np.float32)
    packed = np.ascontiguousarray(blocks[:, _HALF:])
    if kind == Q8_0:
        codes = packed.view(np.int8)
    else:
        codes = np.concatenate([packed & 15, packed >> 4], axis=1).view(np.int8) - np.int8(8)
    return codes.reshape(count, -1), d.reshape(count, -1)
