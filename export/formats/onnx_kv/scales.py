"""Scales of an int8 KV cache: a constant for each channel of each key/value head, from what layers give on text.

onnxruntime clips what is beyond 127 scales, in silence, and rotary embedding turns a key's channel pairs with its
position: within a short text a channel does not meet the largest value that it will have later. Measured on
SmolLM2-135M, int4-g32-scales, KL to the float cache: with the largest values of 2,048 tokens 0.005 near position 164,
0.178 near 1,800. No turn changes a pair's norm, which bounds both of its channels at every position: 0.005 near both.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.architecture import EMBEDDING, ROTATE_IN, Architecture
from export.checkpoints import tokenizer
from export.checkpoints.integers import Integers, values_of
from export.errors import ExportError
from export.formats import Build
from export.host import processor
from export.manifest import CacheScales, TokenizerIds
from export.model import rope_tables
from export.plan import Mixture, load_named
from export.quantization import texts
from export.quantization.layerwise import chunks, load_layer
from export.quantization.spread import spread
from export.quantization.store import QuantizedModel

MIXTURE = "cache"
_WINDOWS, _LENGTH = 7, 512
"""Of the mixture, and one besides it: for estimates."""
MARGIN = 1.15
"""Over the largest that was met. Resolution hardly matters, clipping does: 1.25 times the scales cost nothing that can
be measured, 0.7 times them 13 times the KL."""
_STEPS = 8
"""Scales are rounded up to so many steps an octave, so that the last bits of another processor's sums change none."""
_SMALLEST = 2.0**-20
"""Of a scale, for channels that are always zero."""


def calibrated(model: QuantizedModel, build: Build) -> tuple[tuple[NDArray[np.float32], ...], CacheScales]:
    """Key and value scales of each layer in turn, float32 [G, D], with the tokenizer that is in the build's folder.

    Raises ExportError: a text is too short, a token beyond the vocabulary, or a value not finite.
    """
    mixture, loaded = load_named(Mixture, "mixtures", MIXTURE), tokenizer.load(build.folder)
    found = texts.windows(mixture, loaded)
    ids = torch.cat([found, _beside_text(loaded, build.tokenizer, model.architecture.vocab_size, found.shape[1])])
    if int(ids.max()) >= model.architecture.vocab_size:
        raise ExportError(f"the tokenizer gives id {int(ids.max())}, beyond the vocabulary")
    scales = tuple(scale_of(bound) for pair in bounds(model, ids) for bound in pair)
    return scales, CacheScales(texts=texts.sha256(mixture), tokens=ids.numel())


def memory_bytes(a: Architecture) -> int:
    """The most that `calibrated` holds: the stream, a layer in float32, and what two windows for each thread give."""
    tokens, layer = _WINDOWS * _LENGTH, sum(rows * columns for rows, columns in a.linear_shapes().values())
    widest = 3 * a.intermediate_size + 4 * a.hidden_size + a.num_attention_heads * _LENGTH
    at_once = 2 * _LENGTH * widest * processor.usable()
    return 4 * (2 * tokens * a.hidden_size + 2 * layer // a.num_hidden_layers + at_once)


def _beside_text(loaded: Any, described: TokenizerIds, vocab_size: int, length: int) -> Tensor:
    """Tokens that no text holds, int64 [1, L]: those of a conversation, then some from all over the vocabulary."""
    chat = loaded.encode(described.chat_example or "", add_special_tokens=False)
    ids = torch.tensor([*described.eos_ids, *chat])[:length]
    return torch.cat([ids, torch.linspace(0, vocab_size - 1, length - len(ids)).long()])[None]


def scale_of(bound: Tensor) -> NDArray[np.float32]:
    """What an integer stands for where no value is larger than `bound`, float32 of the same shape."""
    wanted = np.maximum(bound.double().numpy() * MARGIN / 127, _SMALLEST)
    scale: NDArray[np.float32] = np.exp2(np.ceil(np.log2(wanted) * _STEPS) / _STEPS).astype(np.float32)
    return scale


def bounds(model: QuantizedModel, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each layer's keys, at whatever position, and values: the largest magnitudes over ids [W, L], [G, D] each."""
    a = model.architecture
    with model.reader() as weights, torch.inference_mode():

        def read(name: str, rows: Tensor | slice = slice(None)) -> Tensor:
            weight = weights(name)
            if not isinstance(weight, Integers):
                return weight[rows]
            scale = weight.scale[rows].repeat_interleave(weight.group_size, 1)
            return values_of(weight.qdata[rows], weight.levels).mul_(scale)

        stream = read(EMBEDDING, ids.flatten()).view(*ids.shape, -1)
        if a.rotated:
            stream = stream @ read(ROTATE_IN).T
        cos, sin = rope_tables(a, ids.shape[1])
        for index in range(a.num_hidden_layers):
            layer = load_layer(read, a, f"model.layers.{index}.")

            def pass_through(x: Tensor, layer: torch.nn.Module = layer) -> tuple[Tensor, Tensor]:
                out, (keys, values) = layer(x, cos, sin, None)
                x.copy_(out)
                norms = torch.hypot(*keys.chunk(2, -1)).amax((0, 2))
                return torch.cat([norms, norms], -1), values.abs().amax((0, 2))

            keys, values = zip(*spread(pass_through, chunks(stream), "cpu"), strict=True)
            pair = torch.stack(keys).amax(0), torch.stack(values).amax(0)
            if not all(bool(bound.isfinite().all()) for bound in pair):
                raise ExportError(f"layer {index}: keys or values are not finite; an int8 cache has no scale for them")
            yield pair
