"""Intervals are those of scipy's own t tests, and stay silent where values are nearly identical."""

from math import inf, isnan, nan
from statistics import mean, stdev

import numpy as np
import pytest
from scipy.stats import t as student_t
from scipy.stats import ttest_ind, ttest_rel

from export.toolbox import significance

A, B = [9.5, 10.0, 11.5, 10.25], [12.0, 9.0, 12.5, 14.0]


def half(interval):
    return (interval.high - interval.low) / 2


def test_paired_and_unpaired_intervals_are_scipys():
    assert significance.paired(A, B) == pytest.approx(half(ttest_rel(B, A).confidence_interval()), rel=1e-12)
    for b in (B, [*B, 11.0, 13.0]):
        ours = significance.unpaired(stdev(A), len(A), stdev(b), len(b))
        assert ours == pytest.approx(half(ttest_ind(A, b, equal_var=False).confidence_interval()), rel=1e-12)
    assert significance.paired(A, B) != pytest.approx(significance.unpaired(stdev(A), 4, stdev(B), 4), rel=1e-3)


def test_one_more_value_lies_within_the_prediction_interval_nineteen_times_of_twenty():
    by_hand = student_t.ppf(0.975, 3) * stdev(A) * (1 + 1 / 4) ** 0.5
    assert significance.next_value(A) == pytest.approx(by_hand, rel=1e-12)
    drawn = np.random.default_rng(0).standard_normal((2000, 6))
    inside = [abs(row[5] - mean(row[:5])) <= significance.next_value(row[:5].tolist()) for row in drawn]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_what_does_not_vary_has_no_noise_and_warns_of_nothing():
    assert significance.paired([0.2] * 3, [0.3] * 3) == pytest.approx(0, abs=1e-15)
    assert significance.paired([0.2], [0.3]) == 0
    assert isnan(significance.paired([nan, 0.2, 0.3], [0.1, 0.2, 0.3]))
    assert isnan(significance.paired([0.1, 0.2], [inf, 0.2]))
    assert significance.unpaired(0.0, 1, 0.0, 1) == 0
    assert significance.unpaired(0.5, 1, 0.5, 4) == inf
