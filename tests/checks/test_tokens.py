"""The tokens of two machines may differ, but only from a choice on that noise can decide."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from export.manifest import ROOT
from runtime_tests.checks import tokens
from runtime_tests.checks.comparisons import References
from runtime_tests.evaluation import Windows

WINDOWS = Windows(np.arange(12).reshape(1, 12), ("english",), prefill=4)
NOISE = 0.01
"""Standard deviation of a logit; that of a gap is √2 as large, and three of those are allowed: 0.042."""


@pytest.fixture
def references(tmp_path):
    """References with and without noise."""
    quiet = np.zeros((1, 20, 2000), np.float32)
    noisy = quiet + NOISE * np.random.default_rng(1).standard_normal(quiet.shape).astype(np.float32)
    for name, logits in (("quantized", quiet), ("noise", noisy)):
        np.save(tmp_path / f"{name}.npy", logits)
    quantized, noise = tmp_path / "quantized.npy", tmp_path / "noise.npy"
    return References(huggingface=quantized, fp32=quantized, quantized=quantized, noise=noise)


@pytest.fixture
def judged(monkeypatch):
    """The gate for the answers of two machines, with the logits of this one where they differ."""

    def judge(references, here, there, logits=None, *, count=4, attached=True):
        monkeypatch.setattr(tokens, "logits_here", lambda subject, fed: logits[tuple(fed)])
        subject = SimpleNamespace(
            limits=SimpleNamespace(compared_tokens=count),
            setting=SimpleNamespace(place=SimpleNamespace(attached=attached, threads=1), threads=1),
            folder_text=str(ROOT),
            run_here=lambda job, label: {"tokens": here},
            run_on_device=lambda job, label: {"tokens": there},
        )
        return tokens.check_device(subject, WINDOWS, references).gates

    return judge


def parting(gap):
    """After the prompt and two common tokens, this machine prefers 7 to 5 by that gap."""
    logits = np.zeros(10, np.float32)
    logits[7] = gap
    return {(0, 1, 2, 3, 9, 8): logits}


def test_equal_answers_need_no_look_at_logits(judged, references):
    (gate,) = judged(references, [1, 2, 3, 4], [1, 2, 3, 4])
    assert (gate.verdict, gate.value, gate.detail) == ("pass", 0.0, "4 of 4 equal")


@pytest.mark.parametrize(("gap", "verdict"), [(0.04, "pass"), (0.045, "fail"), (3.0, "fail")])
def test_answers_may_part_at_a_close_choice_only(judged, references, gap, verdict):
    (gate,) = judged(references, [9, 8, 7, 6], [9, 8, 5, 6], parting(gap))
    assert (gate.verdict, gate.value) == (verdict, pytest.approx(gap))
    assert gate.detail.startswith("2 of 4 equal, then a choice this close here")


def test_without_a_measure_of_noise_they_may_not_part(judged, references):
    (gate,) = judged(replace(references, noise=None), [9, 8, 7, 6], [9, 8, 5, 6], parting(0.001))
    assert gate.verdict == "fail"


def test_logits_that_are_no_numbers_do_not_excuse(judged, references):
    assert judged(references, [9, 8, 7, 6], [9, 8, 5, 6], parting(np.nan))[0].verdict == "fail"


def test_one_machine_is_not_compared_with_itself(judged, references):
    assert judged(references, [1], [2], attached=False) == ()
    assert judged(references, [1], [2], count=None) == ()
