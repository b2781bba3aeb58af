"""How much of a difference noise explains: half-widths of 95 % intervals, by Student's t.

From standard errors, not by `scipy.stats.ttest_rel` and `ttest_ind`: those warn where values are nearly identical, as
repeats on a steady device are, and need the samples, of which a baseline stores the deviation only.
"""

from collections.abc import Sequence
from math import inf, isfinite, nan, sqrt
from statistics import stdev


def _half_interval(standard_error: float, freedom: float) -> float:
    from scipy.stats import t as student_t  # a second, which processes that judge nothing need not wait

    return float(student_t.ppf(0.975, freedom)) * standard_error


def paired(before: Sequence[float], now: Sequence[float]) -> float:
    """For the mean difference of the same items measured twice (paired t); 0 for a single item, NaN if one is none."""
    differences = [b - a for a, b in zip(before, now, strict=True)]
    if not all(map(isfinite, differences)):
        return nan
    count = len(differences)
    return _half_interval(stdev(differences) / sqrt(count), count - 1) if count > 1 else 0.0


def unpaired(a_stddev: float, a_count: int, b_stddev: float, b_count: int) -> float:
    """For the difference of two means of unequal spread (Welch's t); 0 where no sample differs from another.

    Infinite for a single sample, whose deviation is unknown.
    """
    if not (a_stddev or b_stddev):
        return 0.0
    if min(a_count, b_count) < 2:
        return inf
    a, b = a_stddev**2 / a_count, b_stddev**2 / b_count
    freedom = (a + b) ** 2 / (a**2 / (a_count - 1) + b**2 / (b_count - 1))
    return _half_interval(sqrt(a + b), freedom)


def of_median(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median (sign test): whatever the distribution, a few outliers do not widen it.

    Unbounded for fewer than six values.
    """
    from scipy.stats import binom

    ordered, count = sorted(values), len(values)
    left_out = int(binom.ppf(0.025, count, 0.5)) if count else 0  # on each side
    return (ordered[left_out - 1], ordered[-left_out]) if left_out else (-inf, inf)


def next_value(values: Sequence[float]) -> float:
    """For one more value of the same kind (prediction interval)."""
    count = len(values)
    return _half_interval(stdev(values) * sqrt(1 + 1 / count), count - 1)
