"""The fp32 model of a checkpoint in eager PyTorch behind the session protocol: what retention is measured against."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from export import first_calls
from export.manifest import Manifest
from export.model import Cache
from export.quantize import eager

from ..weights import checkpoint_of

PIECE = 512
"""Most tokens of one forward pass: it yields the logits of each."""


class EagerSession:
    """Our model with float32 weights and a cache that grows."""

    measures_speed = False

    def __init__(self, described: Manifest, source: str | None, threads: int) -> None:
        first_calls.settle()
        torch.set_num_threads(threads)
        checkpoint = checkpoint_of(described, source)
        self.model = eager(checkpoint.read, checkpoint.architecture, "none")
        self.context_length = described.contract.kv.context_length
        self.cache: Cache | None = None

    def reset(self) -> None:
        self.cache = None

    def rewind(self, length: int) -> None:
        if self.cache:
            self.cache = tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in self.cache)

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        for logits in self.pieces(tokens):
            last: NDArray[np.float32] = logits[-1]
        return last

    def feed_each(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.concatenate(list(self.pieces(tokens)))

    def pieces(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits [S, V] of one forward pass after the other."""
        fed = self.cache[0][0].shape[2] if self.cache else 0
        if not tokens or fed + len(tokens) > self.context_length:
            raise ValueError(f"{len(tokens)} tokens at position {fed}: the context holds {self.context_length}")
        for first in range(0, len(tokens), PIECE):
            with torch.inference_mode():
                logits, self.cache = self.model(torch.tensor([tokens[first : first + PIECE]]), self.cache)
            yield logits[0].numpy()

    def close(self) -> None:
        del self.model, self.cache
