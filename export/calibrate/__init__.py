"""Integers chosen by what a layer computes on real text, instead of by rounding each weight on its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import tokenizer
from ..checkpoint import Checkpoint
from ..errors import ExportError
from ..plan import Architecture, Calibration, WeightScheme
from ..rounding import Rounded
from . import texts
from .gptq import Rounding
from .layerwise import Both, Done, round_layers


def round_linears(
    checkpoint: Checkpoint, calibration: Calibration, scheme: WeightScheme, embedding: torch.Tensor, done: Done
) -> Iterator[tuple[str, Rounded]]:
    """Name and integers of every linear of the layers, in execution order.

    `embedding` is the table [V, D] the quantized model looks tokens up in, float32.
    """
    ids = tokens(checkpoint, calibration)
    table = checkpoint.read("model.embed_tokens.weight")
    stream = Both(torch.nn.functional.embedding(ids, table), torch.nn.functional.embedding(ids, embedding))
    del table, embedding
    rounding = Rounding(scheme, calibration.damping, calibration.pull)
    with torch.inference_mode():
        yield from round_layers(checkpoint.read, checkpoint.architecture, rounding, stream, done)


def tokens(checkpoint: Checkpoint, calibration: Calibration) -> torch.Tensor:
    """The calibration text in the checkpoint's own tokens, int64 [W, L]."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.write(checkpoint.source, Path(folder), checkpoint.architecture.vocab_size)
        ids = texts.windows(calibration, tokenizer.load(Path(folder)))
    if int(ids.max()) >= checkpoint.architecture.vocab_size:
        raise ExportError(f"the tokenizer gives id {int(ids.max())}, beyond the vocabulary")
    return ids


def memory_bytes(calibration: Calibration, a: Architecture) -> int:
    """The most that `round_linears` holds: both streams and what down_proj reads, its moments and their factors.

    The factors are float64: the damped moments, their inverse, its factor; three at a time. Half as much again is what
    stands beside them, measured: pieces being computed, memory freed in between.
    """
    count = sum(text.windows for text in calibration.texts) * calibration.length
    streams = 2 * 4 * count * (a.hidden_size + a.intermediate_size)
    moments = a.intermediate_size**2 * (2 * 4 + 3 * 8) + 4 * a.intermediate_size * a.hidden_size * 8
    layer = 2 * 4 * (3 * a.intermediate_size + 4 * a.hidden_size) * a.hidden_size
    table = 2 * 4 * a.vocab_size * a.hidden_size
    return max((streams + moments + layer) * 3 // 2, table + 2 * 4 * count * a.hidden_size)
