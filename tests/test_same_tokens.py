"""Two machines may answer with other tokens, but only from a choice on that noise can decide."""

from types import SimpleNamespace

import numpy as np
import pytest

from export.manifest import ROOT
from runtime_tests import same_tokens
from runtime_tests.evaluation import Windows

WINDOWS = Windows(np.arange(12).reshape(1, 12), ("english",), prefill=4)
NOISE = 0.01
"""Standard deviation of a logit; of a gap √2 as much, of which three are allowed: 0.042."""


@pytest.fixture
def files(tmp_path):
    """References with and without noise."""
    quiet = np.zeros((1, 20, 2000), np.float32)
    noisy = quiet + NOISE * np.random.default_rng(1).standard_normal(quiet.shape).astype(np.float32)
    for name, logits in (("quantized", quiet), ("noise", noisy)):
        np.save(tmp_path / f"{name}.npy", logits)
    return {name: tmp_path / f"{name}.npy" for name in ("quantized", "noise")}


@pytest.fixture
def judged(monkeypatch):
    """The gate for answers of here and there, with the logits of here where they part."""

    def judge(files, here, there, logits=None, *, count=4, attached=True):
        job = {"tokens here": here, "tokens there": there}
        monkeypatch.setattr(same_tokens, "ask", lambda case, _, label: {"tokens": job[label]})
        monkeypatch.setattr(same_tokens, "ask_artifact", lambda case, _, label: {"tokens": job[label]})
        monkeypatch.setattr(same_tokens, "logits_here", lambda case, tokens: logits[tuple(tokens)])
        place = SimpleNamespace(attached=attached, threads=1)
        case = SimpleNamespace(
            limits=SimpleNamespace(compared_tokens=count),
            setting=SimpleNamespace(place=place, threads=1),
            folder_text=str(ROOT),
            gates=[],
        )
        same_tokens.check(case, WINDOWS, files)
        return case.gates

    return judge


def parting(gap):
    """After the prompt and the two tokens they share, here prefers 7 to 5 by that gap."""
    logits = np.zeros(10, np.float32)
    logits[7] = gap
    return {(0, 1, 2, 3, 9, 8): logits}


def test_equal_answers_need_no_look_at_logits(judged, files):
    (gate,) = judged(files, [1, 2, 3, 4], [1, 2, 3, 4])
    assert (gate.verdict, gate.value, gate.detail) == ("pass", 0.0, "4 of 4 equal")


@pytest.mark.parametrize(("gap", "verdict"), [(0.04, "pass"), (0.045, "fail"), (3.0, "fail")])
def test_answers_may_part_at_a_close_choice_only(judged, files, gap, verdict):
    (gate,) = judged(files, [9, 8, 7, 6], [9, 8, 5, 6], parting(gap))
    assert (gate.verdict, gate.value) == (verdict, pytest.approx(gap))
    assert gate.detail.startswith("2 of 4 equal, then a choice this close here")


def test_without_a_measure_of_noise_they_may_not_part(judged, files):
    (gate,) = judged({"quantized": files["quantized"]}, [9, 8, 7, 6], [9, 8, 5, 6], parting(0.001))
    assert gate.verdict == "fail"


def test_logits_that_are_no_numbers_do_not_excuse(judged, files):
    assert judged(files, [9, 8, 7, 6], [9, 8, 5, 6], parting(np.nan))[0].verdict == "fail"


def test_one_machine_is_not_compared_with_itself(judged, files):
    assert judged(files, [1], [2], attached=False) == []
    assert judged(files, [1], [2], count=None) == []
