"""A conversation: what is fed to the reused cache, where the context ends, what is shown."""

import numpy as np
import pytest

from export.errors import ExportError
from runtime_tests.chat import conversation as module
from runtime_tests.chat.conversation import End
from tests.support.artifacts import set_fault
from tests.support.conversations import MESSAGES, SHORT, ask, opened
from tests.support.reliability import CONVERSATION, NUMBERS

# ── the reused cache ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_turn_feeds_only_what_is_new_and_answers_as_a_fresh_session_does(talk):
    conversation = talk()
    session = conversation.cache.session
    for message in MESSAGES:
        prompt = conversation.prompt([*conversation.turns, {"role": "user", "content": message}])
        held = len(conversation.cache.tokens)
        session.fed.clear()
        answer = ask(conversation, message)
        assert answer.prefilled == len(session.fed[0])
        if held:
            assert session.fed[0] == prompt[-answer.prefilled :]
            assert answer.prefilled == len(message) + 5  # last of the answer, its end, three of the template
        fresh = ask_fresh(talk, conversation, message)
        assert (answer.text, fresh.prefilled) == (fresh.text, len(prompt))


def ask_fresh(talk, conversation, message):
    """The same message after the same past, in a session that holds nothing."""
    other = talk()
    other.turns = conversation.turns[:-2]
    return ask(other, message)


def test_the_logits_after_a_kept_cache_are_a_fresh_sessions(talk, built):
    conversation = talk()
    for message in MESSAGES[:2]:
        ask(conversation, message)
    prompt = conversation.prompt([*conversation.turns, {"role": "user", "content": "why"}])
    cache = conversation.cache
    reused = cache.feed(prompt[cache.share(prompt) :], lambda: False)
    fresh = opened(built).feed(prompt)
    assert np.abs(reused - fresh).max() < 1e-4 * np.abs(fresh).max()


def test_a_cache_that_is_not_rewound_gives_other_logits(talk, artifact):
    """The twin: the same comparison, with a session that keeps what it should forget."""
    set_fault(artifact, "rewinds nothing")
    conversation = talk(folder=artifact)
    ask(conversation, "hello")
    conversation.system = "Be brief."  # rewrites the past
    prompt = conversation.prompt([*conversation.turns, {"role": "user", "content": "why"}])
    cache = conversation.cache
    cache.tokens[:0] = prompt[:1]  # something in common, so that it is a rewind and no reset
    reused = cache.feed(prompt[cache.share(prompt) :], lambda: False)
    fresh = opened(artifact).feed(prompt)
    assert np.abs(reused - fresh).max() > 1e-2 * np.abs(fresh).max()


def test_another_system_message_rewinds_to_what_is_left_in_common(talk):
    conversation = talk()
    conversation.system = "Be brief."
    ask(conversation, "hello")
    conversation.cache.session.rewinds.clear()
    conversation.system = "Be bold."
    prompt = conversation.prompt([*conversation.turns, {"role": "user", "content": "why"}])
    answer = ask(conversation, "why")
    assert conversation.cache.session.rewinds == [1 + len("Be b")]
    assert answer.prefilled == len(prompt) - 1 - len("Be b")


def test_the_same_prompt_again_feeds_its_last_token_only(talk):
    conversation = talk()
    first = ask(conversation, "hello")
    conversation.reset()
    again = ask(conversation, "hello")
    assert (again.prefilled, again.text) == (1, first.text)


def test_long_prompts_are_fed_in_pieces(talk, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 10)
    conversation = talk(max_new_tokens=1)
    answer = ask(conversation, "a" * 25)
    assert [len(piece) for piece in conversation.cache.session.fed] == [10, 10, 8]
    assert answer.prefilled == 28


def test_a_message_that_is_stopped_while_it_is_read_is_left_out(talk, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 10)
    conversation = talk()
    fed = conversation.cache.session.fed
    answer = ask(conversation, "a" * 25, stopped=lambda: len(fed) == 1)
    assert (answer.end, answer.text, conversation.turns) == (End.NOT_BEGUN, "", [])
    assert len(conversation.cache.tokens) == 10
    assert ask(conversation, "a" * 25).prefilled == 18  # it goes on where it was


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(talk):
    conversation = talk()
    whole = ask(conversation, "hello").text
    conversation.reset()
    fed = conversation.cache.session.fed
    fed.clear()
    answer = ask(conversation, "hello", stopped=lambda: len(fed) == 5)
    assert answer.end is End.STOPPED
    assert conversation.turns[-1] == {"role": "assistant", "content": answer.text}
    assert 0 < len(answer.text) < len(whole)
    assert whole.startswith(answer.text)


# ── the context ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_ends_where_the_context_does_and_reset_begins_anew(talk, short):
    conversation = talk(folder=short, max_new_tokens=10**6)
    answer = ask(conversation, "hello")
    assert (answer.end, answer.context_used) == (End.CONTEXT, SHORT)
    assert len(answer.text) == SHORT - len("hello") - 3 + 1  # the last token is shown, and never fed
    turns = list(conversation.turns)
    with pytest.raises(ExportError, match=r"this conversation has 73 tokens, the artifact's context 64"):
        ask(conversation, "more")
    assert conversation.turns == turns
    conversation.reset()
    assert ask(conversation, "hello").text == answer.text


def test_a_prompt_that_fills_the_context_gets_one_token_and_one_more_is_refused(talk, short):
    conversation = talk(folder=short)
    answer = ask(conversation, "a" * (SHORT - 3))
    assert (answer.end, answer.decoded, answer.context_used) == (End.CONTEXT, 0, SHORT)
    for _ in range(2):  # in a conversation too, for to forget it would not help
        with pytest.raises(ExportError) as refused:
            ask(conversation, "a" * (SHORT - 2))
        assert str(refused.value) == (
            "this message is too long: 65 tokens with the chat template, the artifact's context has 64; "
            "write a shorter one"
        )
        conversation.reset()


@NUMBERS
def test_a_token_that_the_model_does_not_have_is_refused_and_the_cache_stays(talk):
    conversation = talk()
    first = ask(conversation, "hello")
    held = list(conversation.cache.tokens)
    with pytest.raises(ExportError, match="runtime: token 512: the vocabulary has 512"):
        conversation.cache.feed([5, 512], lambda: False)
    assert conversation.cache.tokens == held
    conversation.reset()
    assert ask(conversation, "hello").text == first.text


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────


def spelled(text, words, end=True):
    """Chooses the bytes of a text one after the other, whatever the logits are."""
    ids = words.encode(text, add_special_tokens=False) + [words.eos_token_id] * end
    left = iter(ids)
    return lambda logits: next(left)


def test_characters_of_several_bytes_are_shown_whole(talk, words):
    text = "Grüße, 日本 👩‍🚀!"
    conversation = talk(choose=spelled(text, words), max_new_tokens=100)
    shown = []
    answer = conversation.ask("hello", shown.append, lambda: False)
    assert len(words.encode(text)) == len(text.encode()) > len(text)  # one token per byte
    assert shown == list(text)
    assert (answer.text, answer.end) == (text, End.MODEL)
    assert conversation.turns[-1]["content"] == text


def test_bytes_shown_one_by_one_would_not_be_characters(words):
    """The twin: what the test above would see without the decoder that waits."""
    naive = [words.decode([token]) for token in words.encode("ü")]
    assert naive == ["\N{REPLACEMENT CHARACTER}"] * 2


@CONVERSATION
@pytest.mark.parametrize("end", [End.LIMIT, End.STOPPED, End.CONTEXT, End.MODEL])
def test_half_a_character_at_the_end_is_shown_and_kept_as_broken(talk, words, end, short, built):
    limit = 2 if end is End.LIMIT else 100
    half = iter([*words.encode("aü", add_special_tokens=False)[:2], words.eos_token_id])
    conversation = talk(
        choose=lambda _: next(half), max_new_tokens=limit, folder=short if end is End.CONTEXT else built
    )
    message = "b" * (SHORT - 4) if end is End.CONTEXT else "hello"
    fed = conversation.cache.session.fed
    answer = ask(conversation, message, stopped=lambda: end is End.STOPPED and len(fed) == 2)
    assert (answer.text, answer.end) == ("a\N{REPLACEMENT CHARACTER}", end)
    assert conversation.turns[-1]["content"] == answer.text


def test_special_tokens_are_not_shown(talk, words):
    conversation = talk(choose=spelled("a<|user|>b", words))
    assert ask(conversation, "hello").text == "ab"


# ── saved conversations ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"system": null}',
        b'{"system": 1, "turns": []}',
        b'{"system": null, "turns": [], "more": 1}',
        b'{"system": null, "turns": [{"role": "tool", "content": "x"}]}',
        b'{"system": null, "turns": [{"role": "user", "content": "\\ud800"}]}',
        b'{"system": null, "turns": ' + b"[" * 9000,
    ],
)
def test_a_saved_cache_without_a_conversation_is_refused_and_the_talk_goes_on(talk, tiny, tmp_path, note):
    folder = tiny("onnx-cpu")
    conversation = talk(folder=folder)
    ask(conversation, "hello")
    turns, whole = list(conversation.turns), tmp_path / "whole"
    conversation.save(whole)
    expected = ask(conversation, "why").text
    conversation.load(whole)
    assert conversation.turns == turns
    conversation.cache.save(tmp_path / "kept", note)
    with pytest.raises(ExportError, match="kept: holds a KV cache and no conversation"):
        conversation.load(tmp_path / "kept")
    assert conversation.turns == turns
    assert ask(conversation, "why").text == expected


def test_a_system_message_is_prefilled_once(talk):
    conversation = talk()
    conversation.instruct("Be brief and kind.")
    first = ask(conversation, "hello")
    ask(conversation, "and then?")
    conversation.reset()
    again = ask(conversation, "why")
    assert first.prefilled > len("Be brief and kind.") + len("hello")
    assert again.prefilled == len("why") + 2  # and what the template puts behind a message
