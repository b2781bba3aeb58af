"""The memory that quantizing needs, from shapes alone."""

import os

import torch

from export.architecture import Architecture
from export.plan import Mixture, QuantRecipe

from . import rotation, schemes
from .nearest import BLOCK_ELEMENTS

_ROUNDING_BYTES = 50
"""What rounding holds for each element of a block, measured: the block in float32 a dozen times over."""
_FACTOR_BYTES = 3 * 8
"""For each pair of a linear's inputs: the damped moments, their inverse and its factor, float64."""


def memory_bytes(recipe: QuantRecipe, architecture: Architecture) -> int:
    """The most that quantizing holds beyond the imported libraries, bytes; 0 for a recipe that quantizes nothing.

    At first the largest tensor: in float32, rounded block by block, its integers joined. In the end all integers, and
    what the blocks left behind: half as much again as they need at a time.
    """
    counts = schemes.of_recipe(recipe, architecture).counts()
    if not counts.integers:
        return 0
    calibrating = _calibrating_bytes(recipe, recipe.calibration, architecture) if recipe.calibration else 0
    blocks = min(os.cpu_count() or 1, -(-counts.largest // BLOCK_ELEMENTS))
    block_bytes = _ROUNDING_BYTES * min(blocks * BLOCK_ELEMENTS, counts.largest)
    rotating = rotation.memory_bytes(architecture) if recipe.rotation else 0
    return rotating + max(6 * counts.largest + block_bytes, counts.store_bytes + max(calibrating, block_bytes * 3 // 2))


def _calibrating_bytes(recipe: QuantRecipe, mixture: Mixture, a: Architecture) -> int:
    """The most that calibrating holds beside the integers; a model that writes text itself is there as a whole.

    Half as much again as what is counted stands beside it, measured: chunks being computed, memory freed in between.
    """
    count = mixture.windows * mixture.length
    table, layer = 4 * a.vocab_size * a.hidden_size, 4 * (3 * a.intermediate_size + 4 * a.hidden_size) * a.hidden_size
    if recipe.method == "scales":
        walking, embedding = 4 * count * a.hidden_size + 2 * layer, table + 4 * count * a.hidden_size
    else:
        walking = 2 * 4 * count * (a.hidden_size + a.intermediate_size) + _gptq_bytes(a) + 2 * layer
        embedding = 2 * (table + 4 * count * a.hidden_size)
    return max(walking * 3 // 2, embedding, _writing_bytes(mixture, a))


def _gptq_bytes(a: Architecture) -> int:
    """Moments of what down_proj reads, their factors, and its weight on the way."""
    return a.intermediate_size**2 * (2 * 4 + _FACTOR_BYTES) + 4 * a.intermediate_size * a.hidden_size * 8


def _writing_bytes(mixture: Mixture, a: Architecture) -> int:
    """Of a model that writes calibration text: its weights, and the cache of all rows, twice while it grows."""
    if mixture.generated is None:
        return 0
    cache = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * mixture.length
    weights = sum(torch.Size(shape).numel() for shape in a.tensor_shapes().values())
    return 4 * (weights + 2 * mixture.generated.windows * cache)
