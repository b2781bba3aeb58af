"""Medians, spreads and paired ratios of repeated measurements. Knows nothing about what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
ENOUGH = 3
"""Repetitions below which nothing is called faster or slower."""


@dataclass(frozen=True)
class Spread:
    """Repeated values: the median, and what eight of ten lie between."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Ratio:
    """One thing over another, repetition by repetition: the median of the ratios and their quartiles."""

    median: float
    q1: float
    q3: float
    pairs: int

    @property
    def verdict(self) -> str:
        """For rates, where more is better: a difference is one that three of four repetitions show."""
        if self.pairs < ENOUGH:
            return "too few repetitions"
        if self.q1 > 1:
            return "faster"
        return "slower" if self.q3 < 1 else "no clear difference"


def spread(values: Sequence[float]) -> Spread:
    """Median, p10 and p90, interpolated between values."""
    p10, median, p90 = np.quantile(values, (0.1, 0.5, 0.9))
    return Spread(float(median), float(p10), float(p90))


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Ratio | None:
    """Ratios of the repetitions both have, so that what slows a whole repetition cancels; None without any."""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    q1, median, q3 = np.quantile([ours[i] / theirs[i] for i in both], (0.25, 0.5, 0.75))
    return Ratio(float(median), float(q1), float(q3), len(both))


def rotated(items: Sequence[Item], repetition: int) -> list[Item]:
    """The order of a repetition: A B C, B C A, C A B, … so that no contender always follows the same one's heat."""
    start = repetition % len(items)
    return [*items[start:], *items[:start]]
