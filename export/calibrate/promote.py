"""Which linears get more bits: those that save most KL per byte first, until the budget is met. Knows no weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil, inf
from typing import TypeVar

import torch

from ..errors import ExportError
from ..manifest import Candidate
from ..plan import Promotion, QuantRecipe
from ..schemes import Schemes, bits_each
from .sensitivity import Sensitivity

FLOAT_BITS = 32
ATTEMPTS = 8
MARGIN = 0.98
"""A choice aims a little below the limit: predictions are not exact, and another attempt costs a whole rounding."""


def ranked(found: Mapping[str, Sensitivity], base: Schemes, promotion: Promotion) -> list[Candidate]:
    """Every linear, the one that saves most per byte first."""
    candidates = []
    for name, shape in base.architecture.linear_shapes().items():
        before = base.of(name)
        assert before is not None
        more = bits_each(promotion.scheme, shape[-1]) - bits_each(before, shape[-1])
        candidates.append(
            Candidate(
                name=name,
                kl=found[name].kl,
                promoted_kl=found[name].promoted_kl,
                extra_bytes=int(torch.Size(shape).numel() * more / 8),
                promoted=False,
            )
        )
    return sorted(candidates, key=lambda one: (one.promoted_kl - one.kl) / one.extra_bytes)


def affordable(candidates: Sequence[Candidate], extra_bytes: float) -> list[str]:
    """Names, best first, each taken when it still fits."""
    chosen = []
    for one in candidates:
        if one.extra_bytes <= extra_bytes:
            chosen.append(one.name)
            extra_bytes -= one.extra_bytes
    return chosen


def budget_bytes(recipe: QuantRecipe, base: Schemes) -> float:
    """Bytes that promotions may add.

    Raises ExportError: the recipe without any promotion is over its budget already.
    """
    promotion = recipe.promotion
    assert promotion is not None
    shapes = base.architecture.linear_shapes()
    if promotion.linear_bits_per_weight is not None:
        weights = sum(torch.Size(shape).numel() for shape in shapes.values())
        smallest = sum(
            torch.Size(shape).numel() * bits_each(base.by_name[name], shape[-1]) for name, shape in shapes.items()
        )
        refuse_below(recipe, "linear_bits_per_weight", promotion.linear_bits_per_weight, smallest / weights)
        return (promotion.linear_bits_per_weight * weights - smallest) / 8
    assert promotion.size_budget_mb is not None
    smallest = base.stored_bits(float_bits=FLOAT_BITS) / 8
    refuse_below(recipe, "size_budget_mb", promotion.size_budget_mb, smallest / 1e6)
    return promotion.size_budget_mb * 1e6 - smallest


def refuse_below(recipe: QuantRecipe, what: str, asked: float, smallest: float) -> None:
    """A budget that is spent before anything is promoted."""
    if asked < smallest:
        nearest = ceil(smallest * 1000) / 1000
        raise ExportError(
            f"recipe {recipe.name!r}: {what} {asked:g} cannot be met: without any promotion it is {nearest:g}; give at "
            "least that, or larger groups in `linear`"
        )


Outcome = TypeVar("Outcome")


def until_kl(
    recipe: QuantRecipe,
    candidates: Sequence[Candidate],
    attempt: Callable[[list[str]], tuple[Outcome, float]],
) -> tuple[list[str], Outcome]:
    """The fewest promotions found whose rounded model loses no more than `max_kl` on held-out text.

    `attempt` rounds with some names promoted and measures the loss. The loss is taken to be in proportion to what the
    estimates say remains, and the proportion is corrected by each attempt; promoting everything is the last resort.

    Raises ExportError: even that loses more.
    """
    assert recipe.promotion is not None
    assert recipe.promotion.max_kl is not None
    limit, everything, names = recipe.promotion.max_kl, len(candidates), [one.name for one in candidates]
    count, kl = 0, inf
    for left in reversed(range(ATTEMPTS)):
        outcome, kl = attempt(names[:count])
        if kl <= limit:
            return names[:count], outcome
        if count == everything:
            break
        wanted = most_that_remains(candidates, remaining(candidates, count) * MARGIN * limit / kl)
        count = max(wanted, count + 1) if left > 1 else everything
    raise ExportError(
        f"recipe {recipe.name!r}: max_kl {limit:g} cannot be met: with every linear at {recipe.promotion.scheme.bits} "
        f"bits the KL on held-out text is {kl:.4g}; give at least that, or more bits for embedding and head"
    )


def remaining(candidates: Sequence[Candidate], count: int) -> float:
    """Estimated KL with the first `count` promoted."""
    return sum(one.promoted_kl for one in candidates[:count]) + sum(one.kl for one in candidates[count:])


def most_that_remains(candidates: Sequence[Candidate], kl: float) -> int:
    """The fewest promotions, best first, after which no more than `kl` is estimated to remain; else all."""
    for count in range(len(candidates)):
        if remaining(candidates, count) <= kl:
            return count
    return len(candidates)


def mark(candidates: Iterable[Candidate], names: Iterable[str]) -> tuple[Candidate, ...]:
    """The candidates with the chosen ones marked."""
    chosen = set(names)
    return tuple(one.model_copy(update={"promoted": one.name in chosen}) for one in candidates)
