"""Choosing the next token from its logits: greedy, or by temperature and nucleus. Knows no session."""

import numpy as np
from numpy.typing import NDArray

from export.errors import ExportError


class Sampler:
    """The most likely token at temperature 0; above, one drawn from the nucleus.

    `top_p`: the fewest most likely tokens whose probabilities reach it (Holtzman et al. 2019, arXiv 1904.09751).
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generator = np.random.default_rng(seed)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Logits [V] → token id. Raises ExportError: NaN or infinity."""
        if not np.isfinite(logits).all():
            raise ExportError("the artifact computes NaN or infinity; validate it with `python -m runtime_tests`")
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        scaled = (logits[order].astype(np.float64) - logits[order[0]]) / self.temperature
        probabilities = np.exp(scaled)
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        nucleus = probabilities[: max(1, int((before < self.top_p).sum()))]
        return int(order[self.generator.choice(len(nucleus), p=nucleus / nucleus.sum())])
