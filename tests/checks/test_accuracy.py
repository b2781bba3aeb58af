"""Every metric against a number computed by hand or by its definition, and against damage that it must show."""

import math
from collections import Counter

import numpy as np
import pytest

from runtime_tests import evaluation
from runtime_tests.checks import accuracy, loss
from runtime_tests.evidence.record import Comparison, Slice

RNG = np.random.default_rng(0)


def logits(*shape):
    return RNG.standard_normal(shape).astype(np.float32) * 3


def compare(reference, candidate, targets=None, domains=None, ranges=None):
    windows, steps, vocab = reference.shape
    targets = RNG.integers(0, vocab, (windows, steps)) if targets is None else targets
    labels = accuracy.Labels(domains or ["text"] * windows, ranges or ["all"] * steps)
    return accuracy.compare(reference, candidate, targets, labels)


def test_kl_of_two_coins():
    half, skew = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert accuracy.kl_divergence(half, skew)[0] == pytest.approx(expected)
    assert accuracy.kl_divergence(skew, half)[0] != pytest.approx(expected)
    assert accuracy.kl_divergence(half, half)[0] == 0


def test_log_softmax_survives_large_logits():
    assert accuracy.log_softmax(np.float32([[1e4, 0.0]]))[0].tolist() == [0.0, -1e4]


def test_a_shift_of_all_logits_changes_no_distribution():
    reference = logits(1, 4, 9)
    assert compare(reference, reference + 5).mean_kl < 1e-9
    assert compare(reference, reference + 5).max_abs_error == pytest.approx(5, rel=1e-5)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    measured = compare(logits(2, 5, 32), np.zeros((2, 5, 32), np.float32))
    assert measured.perplexity == pytest.approx(32)
    assert measured.perplexity_error == 0


def test_perplexity_error_is_the_standard_error_of_the_mean():
    nll = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert accuracy.perplexity(nll) == pytest.approx(math.exp(2.5))
    assert accuracy.perplexity_error(nll) == pytest.approx(math.exp(2.5) * math.sqrt(5 / 3) / 2)


def test_logits_far_beyond_all_measure_still_make_a_record():
    reference = logits(2, 3, 8)
    measured = compare(reference, reference * -2000)
    assert Comparison.model_validate_json(measured.model_dump_json()) == measured
    assert 1e200 < measured.perplexity < math.inf


def test_sqnr_of_known_noise():
    assert accuracy.sqnr_db(100.0, 1.0) == pytest.approx(20)
    assert accuracy.sqnr_db(1.0, 0.0) == accuracy.BEST_SQNR_DB
    reference = logits(2, 3, 50)
    assert compare(reference, reference * 0.9).sqnr_db == pytest.approx(20, abs=1e-3)


def test_top1_counts_positions():
    reference = np.eye(4, dtype=np.float32)[None] * 5
    candidate = reference.copy()
    candidate[0, 0] = [0, 9, 0, 0]
    assert compare(reference, candidate).top1 == 0.75


def test_identical_logits_are_perfect():
    reference = logits(3, 4, 17)
    measured = compare(reference, reference.copy())
    assert (measured.mean_kl, measured.max_kl, measured.top1, measured.max_abs_error) == (0, 0, 1, 0)
    assert measured.perplexity == measured.reference_perplexity


def test_p99_and_steps_see_one_bad_position():
    reference = logits(2, 100, 8)
    candidate = reference.copy()
    candidate[1, 30:33] = -candidate[1, 30:33]
    measured = compare(reference, candidate)
    assert int(np.argmax(measured.kl_by_step)) in (30, 31, 32)
    assert measured.p99_kl > measured.mean_kl > 0
    assert measured.kl_by_window[0] == 0 < measured.kl_by_window[1]


def test_every_domain_is_as_if_it_were_judged_alone():
    """The third window is damaged, which shows in its language only."""
    reference, targets = logits(3, 6, 8), RNG.integers(0, 8, (3, 6))
    candidate = reference + 0.1 * logits(3, 6, 8)
    candidate[2] = -reference[2]
    measured = compare(reference, candidate, targets, domains=["en", "de", "en"])
    assert list(measured.by_domain) == ["en", "de"]
    alone = compare(reference[::2], candidate[::2], targets[::2])
    for name in Slice.model_fields:
        assert getattr(measured.by_domain["en"], name) == pytest.approx(getattr(alone, name), rel=1e-5)
    assert measured.by_domain["en"].mean_kl > 10 * measured.by_domain["de"].mean_kl
    assert loss.worst(measured.by_domain)[0] == "en"


def test_every_range_of_positions_is_as_if_it_were_judged_alone():
    """A loss at late positions, as of a cache that forgets, shows in their range only."""
    reference, targets = logits(4, 7, 8), RNG.integers(0, 8, (4, 7))
    candidate = reference.copy()
    candidate[:, 5:] *= -1
    measured = compare(reference, candidate, targets, ranges=["end", *["near"] * 4, *["far"] * 2])
    assert {name: part.positions for name, part in measured.by_position.items()} == {"end": 4, "near": 16, "far": 8}
    assert (measured.by_position["near"].mean_kl, measured.by_position["near"].top1) == (0, 1)
    far, alone = measured.by_position["far"], compare(reference[:, 5:], candidate[:, 5:], targets[:, 5:])
    for name in Slice.model_fields:
        assert getattr(far, name) == pytest.approx(getattr(alone, name), rel=1e-5)
    assert far.perplexity != pytest.approx(far.reference_perplexity)
    assert loss.worst(measured.by_position)[0] == "far"


def test_one_position_alone_is_a_slice():
    measured = compare(logits(1, 3, 8), logits(1, 3, 8), ranges=["end", "near", "near"])
    assert measured.by_position["end"].mean_kl == measured.by_position["end"].p99_kl > 0


@pytest.mark.parametrize(
    ("prefill", "decode", "ranges"),
    [
        (64, 64, {"63 (prefill)": 1, "64–127": 64}),
        (64, 448, {"63 (prefill)": 1, "64–127": 64, "128–255": 128, "256–511": 256}),
        (16, 64, {"15 (prefill)": 1, "16–31": 16, "32–63": 32, "64–79": 16}),
        (100, 64, {"99 (prefill)": 1, "100–127": 28, "128–163": 36}),
    ],
)
def test_ranges_of_positions_double_and_end_with_the_window(prefill, decode, ranges):
    assert Counter(evaluation.position_ranges(prefill, decode)) == ranges


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad):
    wrong = logits(3, 4, 5)
    assert accuracy.not_finite(wrong) == ""
    wrong[1, 2, 3] = bad
    assert accuracy.not_finite(wrong) == "NaN or infinity in window 1, step 2"


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes do not fit"):
        compare(logits(1, 2, 3), logits(1, 2, 4))
    with pytest.raises(ValueError, match="1 × 3 labels for positions"):
        compare(logits(1, 2, 3), logits(1, 2, 3), ranges=["a", "b", "c"])


def test_a_whole_vocabulary_matches_a_direct_computation():
    reference, candidate = logits(1, 3, 5000), logits(1, 3, 5000)

    def softmax(x):
        e = np.exp(x.astype(np.float64))
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(reference[0]), softmax(candidate[0])
    assert compare(reference, candidate).mean_kl == pytest.approx((p * np.log(p / q)).sum(-1).mean())
