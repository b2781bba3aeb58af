"""The places of a model where an artifact's values are read, and what is read there."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Points = dict[str, NDArray[np.float32]]
"""Values by the name of their place, [rows, n]; a row for each token, or only for the last one."""
Probe = Callable[[Sequence[Sequence[int]]], Points]
"""Feeds calls of tokens one after the other from an empty cache: the rows of all of them."""

EMBEDDING, ROTATION, LOGITS = "embedding", "rotation", "logits"
"""The rotation is of the embedding, of recipes that have one; the one before the head is with the logits."""
KINDS = (EMBEDDING, ROTATION, "attention", "o_proj", "mlp", LOGITS)


def attention(layer: int) -> str:
    """What the heads give, side by side, before o_proj."""
    return f"{layer} attention"


def o_proj(layer: int) -> str:
    """The residual stream after attention."""
    return f"{layer} o_proj"


def mlp(layer: int) -> str:
    """The residual stream after the layer."""
    return f"{layer} mlp"


def joined(calls: Sequence[Points]) -> Points:
    """The rows of calls one after the other."""
    return {name: np.concatenate([points[name] for points in calls]) for name in calls[0]}
