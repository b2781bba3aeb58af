"""Position, limit, pieces and rewind, which every format's session inherits from the base."""

import numpy as np
import pytest

from runtime_tests.checks import conformance
from runtime_tests.sessions.base import ContextError, Session, TokenError

CONTEXT, VOCAB = 40, 64


class Remembering(Session):
    """Logits that depend on the tokens in the slots; `calls`: position and tokens of every step."""

    def __init__(self, largest_call=8, logits="last"):
        super().__init__(CONTEXT, largest_call, logits, VOCAB)
        self.slots, self.calls = np.zeros(CONTEXT), []
        self.rows = np.empty((largest_call, VOCAB), np.float16)

    def step(self, tokens, position):
        self.calls.append((position, list(tokens)))
        self.slots[position : position + len(tokens)] = tokens
        for row in range(len(tokens)):
            value = self.slots[: position + row + 1] @ np.arange(1, position + row + 2) / 100
            self.rows[row] = np.sin(value * np.arange(1, VOCAB + 1))
        return self.rows[len(tokens) - 1 : len(tokens)] if self.logits == "last" else self.rows[: len(tokens)]


class Shifted(Remembering):
    """Writes one slot too far after a rewind."""

    def rewind(self, length):
        super().rewind(length)
        self.tokens.append(0)


class Bottomless(Remembering):
    """Accepts more tokens than the contract's context."""

    def __init__(self):
        super().__init__()
        self.context_length, self.slots = 2 * CONTEXT, np.zeros(2 * CONTEXT)


def test_tokens_are_cut_into_calls_at_their_positions():
    session = Remembering()
    session.feed([1, 2, 3])
    session.feed(range(10, 30))
    calls = [(0, 3), (3, 8), (11, 8), (19, 4)]
    assert [(position, len(tokens)) for position, tokens in session.calls] == calls
    assert session.position == 23


def test_calls_become_shorter_where_a_session_says_so():
    class Shorter(Remembering):
        def longest(self, position):
            return 8 if position < 16 else 4

    session = Shorter()
    session.feed(range(1, 27))
    assert [(position, len(tokens)) for position, tokens in session.calls] == [
        (0, 8),
        (8, 8),
        (16, 4),
        (20, 4),
        (24, 2),
    ]


def test_what_prompts_begin_with_is_computed_once_in_the_same_calls():
    session, prompts = Remembering(), [[*range(1, 20)], [*range(1, 19), 50, 51], [*range(1, 9), 7], [1, 2], [1, 2, 3]]
    for prompt, first in zip(prompts, (0, 16, 8, 0, 0), strict=True):
        session.calls.clear()
        alone = Remembering()
        expected = alone.feed(prompt)
        assert np.array_equal(session.prefill(prompt), expected)
        assert session.calls == [call for call in alone.calls if call[0] >= first]
        assert session.tokens == prompt
        session.feed([9])  # an answer, in calls of one token


def test_answers_windows_and_rewinds_are_not_taken_for_a_prompt():
    session = Remembering()
    session.prefill([*range(1, 10)])
    session.feed([10] * 7)
    session.calls.clear()
    session.prefill([*range(1, 10), *[10] * 7, 11])  # the second call would hold what single tokens wrote
    assert session.calls[0] == (8, [9, *[10] * 7])
    session.rewind(4)
    session.calls.clear()
    session.prefill([*range(1, 10)])
    assert session.calls[0][0] == 0
    for attribute, value in (("left", [3]), ("oldest", 2)):
        session.prefill([*range(1, 20)])
        setattr(session, attribute, value)
        session.calls.clear()
        session.prefill([*range(1, 20)])
        assert session.calls[0][0] == 0


def test_a_prompt_that_does_not_fit_leaves_what_it_shares():
    session = Remembering()
    session.prefill([*range(1, 20)])
    session.calls.clear()
    with pytest.raises(ContextError):
        session.prefill([*range(1, 9), *[5] * CONTEXT])
    assert session.prefilled == session.position == 8
    assert not session.calls


def test_logits_are_the_callers_own():
    session = Remembering()
    first = session.feed([1, 2])
    before = first.copy()
    session.feed([60])
    np.testing.assert_array_equal(first, before)
    assert first.dtype == np.float32
    assert first.shape == (VOCAB,)


@pytest.mark.parametrize("logits", ["last", "all"])
def test_logits_of_each_token_are_those_of_feeding_one_by_one(logits):
    session, one_by_one = Remembering(logits=logits), Remembering()
    each = session.feed_each(range(1, 20))
    np.testing.assert_array_equal(each, [one_by_one.feed([token]) for token in range(1, 20)])
    assert len(session.calls) == {"last": 19, "all": 3}[logits]


def test_the_last_slot_can_be_fed_and_nothing_of_more():
    session = Remembering()
    session.feed(range(CONTEXT - 1))
    with pytest.raises(ContextError, match=f"2 tokens at position {CONTEXT - 1}: the context holds {CONTEXT}"):
        session.feed([1, 2])
    assert session.position == CONTEXT - 1
    session.feed([1])
    with pytest.raises(ContextError):
        session.feed([1])
    session.rewind(5)
    session.feed([1])
    with pytest.raises(ValueError, match="no tokens"):
        session.feed([])


@pytest.mark.parametrize("token", [VOCAB, -1, 10**6])
def test_a_token_that_the_vocabulary_lacks_is_refused_before_anything_is_fed(token):
    session = Remembering()
    with pytest.raises(TokenError, match=f"token {token}: the vocabulary has {VOCAB}"):
        session.feed([*range(20), token])
    assert (session.position, session.calls) == (0, [])


class Forgetful(Remembering):
    """Many tokens see only each other."""

    def step(self, tokens, position):
        if len(tokens) > 1:
            self.slots[:position] = 0
        return super().step(tokens, position)


class Hasty(Remembering):
    """Begins before it looks."""

    def feed(self, tokens):
        if len(tokens) > CONTEXT - self.position:
            super().feed(tokens[:1])
        return super().feed(tokens)


class Patient(Remembering):
    """Takes what is not there for a token."""

    def feed(self, tokens):
        return super().feed([1 if token >= VOCAB else token for token in tokens] or [1])


def test_conformance_holds_for_the_base_and_finds_what_breaks_it():
    assert conformance.check(Remembering(logits="all"), CONTEXT, fill=True) == []
    rewound, several = conformance.check(Shifted(), CONTEXT, fill=True)
    assert rewound.startswith("after a rewind the logits differ")
    assert several.startswith("after a rewind the logits of several tokens differ")
    past = [f"{what} past the context of {CONTEXT} was accepted" for what in ("a token", "a prompt that goes")]
    assert conformance.check(Bottomless(), CONTEXT, fill=False) == past
    cut, _ = conformance.check(Forgetful(largest_call=CONTEXT), CONTEXT, fill=True)
    assert cut.startswith("a prompt in pieces means something else: KL ")
    changed = "a prompt that is too long was refused and changed the cache"
    assert conformance.check(Hasty(), CONTEXT, fill=True) == [changed]
    assert conformance.check(Patient(), CONTEXT, fill=False) == [
        "an empty prompt was accepted",
        "a token beyond the vocabulary was accepted",
    ]
