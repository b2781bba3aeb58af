"""How a token is chosen from logits."""

import numpy as np
import pytest

from export.errors import ExportError
from runtime_tests.chat.conversation import Sampler


def test_sampling_follows_the_probabilities_inside_the_nucleus():
    probabilities = np.array([0.05, 0.5, 0.3, 0.15], np.float32)
    draw = Sampler(1.0, 0.7, 3)
    counts = np.bincount([draw(np.log(probabilities)) for _ in range(4000)], minlength=4)
    assert counts[0] == counts[3] == 0  # 0.5 + 0.3 reach 0.7
    assert counts[1] / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)
    whole = np.bincount([Sampler(1.0, 1.0, seed)(np.log(probabilities)) for seed in range(1000)], minlength=4)
    assert whole / 1000 == pytest.approx(probabilities, abs=0.05)


def test_temperature_seed_and_their_ends():
    logits = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    assert Sampler(0, 1, None)(logits) == Sampler(2.0, 0.0, 1)(logits) == logits.argmax()
    assert Sampler(1e-6, 1, 1)(logits) == logits.argmax()
    draws = [[draw(logits) for _ in range(20)] for draw in (Sampler(1, 1, 4), Sampler(1, 1, 4), Sampler(1, 1, 5))]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    with pytest.raises(ExportError, match="computes NaN or infinity"):
        Sampler(temperature, 1, 1)(np.array([0, bad], np.float32))
