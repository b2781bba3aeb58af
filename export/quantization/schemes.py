"""How each weight is stored: the scheme of every tensor, the bits and bytes that takes, and the memory to get there.

All of it from shapes alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from export.architecture import EMBEDDING, HEAD, ROTATE_IN, ROTATE_OUT, Architecture
from export.errors import ExportError, suggestion
from export.plan import LayerRule, Mixture, QuantRecipe, WeightScheme

from . import patterns, rotation
from .nearest import BLOCK_ELEMENTS, ROUNDING_BYTES, blocks_at_once

_MOMENTS_BYTES = 5 * 4
"""For each pair of a linear's inputs: the moments, ordered, in reverse and factored, the inverse and its reverse."""


@dataclass(frozen=True)
class _Counts:
    """How many numbers a quantized model has, by the way they are stored; a tied head is the embedding."""

    integers: int
    scales: int
    floats: int
    largest: int
    """Elements of the largest tensor: the embedding of a small model."""

    @property
    def store_bytes(self) -> int:
        """The cached file: an integer takes a byte there, whatever its bits, and a scale four."""
        return self.integers + 4 * self.scales


@dataclass(frozen=True)
class Schemes:
    """The scheme of each quantized tensor of a model, in execution order; every other tensor stays float."""

    architecture: Architecture
    by_name: Mapping[str, WeightScheme]

    @property
    def names(self) -> list[str]:
        """Every quantized tensor."""
        return list(self.by_name)

    def of(self, name: str) -> WeightScheme | None:
        """None: float."""
        return self.by_name.get(name)

    def stored_bits(self, *, float_bits: int) -> float:
        """Bits of all weights: integers and 16-bit scales, tied weights once."""
        bits = 0.0
        for name, shape in self.architecture.tensor_shapes().items():
            scheme = self.of(name)
            bits += prod(shape) * (float_bits if scheme is None else bits_each(scheme, shape[-1]))
        return bits

    def counts(self) -> _Counts:
        """From the shapes alone."""
        integers = scales = floats = largest = 0
        for name, shape in self.architecture.tensor_shapes().items():
            scheme, elements = self.of(name), prod(shape)
            largest = max(largest, elements)
            if scheme is None:
                floats += elements
            else:
                integers += elements
                scales += elements // (scheme.group_size or shape[-1])
        return _Counts(integers, scales, floats, largest)

    def promoted(self, names: Iterable[str], scheme: WeightScheme) -> "Schemes":
        """The same with another scheme for some tensors."""
        return Schemes(self.architecture, {**self.by_name, **dict.fromkeys(names, scheme)})


def bits_each(scheme: WeightScheme, columns: int) -> float:
    """Bits of one number of a weight with that many columns, its share of a 16-bit scale included."""
    return scheme.bits + 16 / (scheme.group_size or columns)


def of_recipe(recipe: QuantRecipe, architecture: Architecture) -> Schemes:
    """What the recipe gives every tensor before any is promoted."""
    architecture = recipe.reshaped(architecture)
    schemes = {name: _scheme_of(recipe, name) for name in architecture.tensor_shapes()}
    schemes |= {name: rule.scheme for name, rule in by_pattern(recipe, architecture).items()}
    return Schemes(architecture, {name: scheme for name, scheme in schemes.items() if scheme})


def largest(recipe: QuantRecipe, architecture: Architecture) -> Schemes:
    """The most a recipe may choose: every linear promoted."""
    base = of_recipe(recipe, architecture)
    if recipe.promotion is None:
        return base
    return base.promoted(architecture.linear_shapes(), recipe.promotion.scheme)


def possible(recipe: QuantRecipe, architecture: Architecture) -> Iterator[tuple[str, WeightScheme]]:
    """Every scheme that a tensor may get, for rules that hold whatever is chosen."""
    yield from of_recipe(recipe, architecture).by_name.items()
    if recipe.promotion is not None:
        yield from dict.fromkeys(architecture.linear_shapes(), recipe.promotion.scheme).items()


def _scheme_of(recipe: QuantRecipe, name: str) -> WeightScheme | None:
    """The scheme a recipe gives to a kind of tensor; norms are never quantized."""
    if name == EMBEDDING:
        return recipe.embedding
    if name == HEAD:
        return recipe.head
    if name in (ROTATE_IN, ROTATE_OUT):
        return recipe.rotation.scheme if recipe.rotation else None
    return None if "norm" in name else recipe.linear


def by_pattern(recipe: QuantRecipe, architecture: Architecture) -> dict[str, LayerRule]:
    """The rule that decides each linear that `layers` names: the last one that matches."""
    return {name: rule for rule in recipe.layers for name in _matching(rule, architecture)}


def _matching(rule: LayerRule, architecture: Architecture) -> list[str]:
    return patterns.matching(rule.pattern, architecture.linear_shapes(), architecture.num_hidden_layers)


_MOST_IDLE = 5
"""Told of a pattern."""


def _check_rules(recipe: QuantRecipe, architecture: Architecture) -> None:
    """Refuse a pattern that decides nothing."""
    deciding = by_pattern(recipe, architecture).values()
    for rule in recipe.layers:
        where = f"recipe {recipe.name!r}: layers: {rule.pattern!r}"
        names = [name.removesuffix(".weight") for name in architecture.linear_shapes()]
        if not _matching(rule, architecture):
            kinds = {f"*.{name.rpartition('.')[2]}" for name in names}
            raise ExportError(f"{where} matches no linear of the layers; {suggestion(rule.pattern, [*kinds, *names])}")
        if unmatched := patterns.idle(rule.pattern, architecture.linear_shapes(), architecture.num_hidden_layers):
            more = f" and {len(unmatched) - _MOST_IDLE} more" if len(unmatched) > _MOST_IDLE else ""
            raise ExportError(
                f"{where} matches nothing by its {', '.join(unmatched[:_MOST_IDLE])}{more}; the model's layers are 0 "
                f"to {architecture.num_hidden_layers - 1}, or -{architecture.num_hidden_layers} to -1"
            )
        if rule not in deciding:
            raise ExportError(f"{where} decides nothing: later patterns match all of its linears; write it after them")


def check(recipe: QuantRecipe, architecture: Architecture) -> None:
    """Refuse a pattern without effect and a group that does not divide, naming the layer, before any work."""
    _check_rules(recipe, architecture)
    if architecture.tie_word_embeddings and recipe.embedding != recipe.head:
        raise ExportError(f"recipe {recipe.name!r}: embedding and head are tied, so their schemes must be equal")
    for name, scheme in possible(recipe, architecture):
        columns = architecture.tensor_shapes()[name][-1]
        if scheme.group_size and columns % scheme.group_size:
            raise ExportError(
                f"recipe {recipe.name!r}: {name} has {columns} input features, which groups of {scheme.group_size} "
                "do not divide; use a recipe with a group size that does (int4-g32)"
            )


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def memory_bytes(recipe: QuantRecipe, architecture: Architecture) -> int:
    """The most that quantizing holds beyond the imported libraries, bytes; 0 for a recipe that quantizes nothing.

    At first the largest tensor: in float32, rounded block by block, its integers joined. In the end all integers, and
    what the blocks left behind: half as much again as they need at a time.
    """
    counts = of_recipe(recipe, architecture).counts()
    if not counts.integers:
        return 0
    calibrating = _calibrating_bytes(recipe, recipe.calibration, architecture) if recipe.calibration else 0
    block_bytes = ROUNDING_BYTES * min(blocks_at_once() * BLOCK_ELEMENTS, counts.largest)
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
        walking = 4 * count * (3 * a.hidden_size + a.intermediate_size) + _gptq_bytes(a) + 2 * layer
        embedding = 2 * (table + 4 * count * a.hidden_size)
    return max(walking * 3 // 2, embedding, _writing_bytes(mixture, a))


def _gptq_bytes(a: Architecture) -> int:
    """Moments of what down_proj reads, their factor, and its weight on the way."""
    return a.intermediate_size**2 * _MOMENTS_BYTES + 4 * a.intermediate_size * a.hidden_size * 8


def _writing_bytes(mixture: Mixture, a: Architecture) -> int:
    """Of a model that writes calibration text: its weights, and the cache of all rows, twice while it grows."""
    if mixture.generated is None:
        return 0
    cache = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * mixture.length
    weights = sum(prod(shape) for shape in a.tensor_shapes().values())
    return 4 * (weights + 2 * mixture.generated.windows * cache)
