"""`python -m runtime_tests chat`: what is fed, what is shown, how it ends."""

import io
import json
import re
import sys

import numpy as np
import pytest

from export import manifest, tokenizer
from export.cli import run as run_app
from export.errors import ExportError
from runtime_tests.chat import command, kept_cache
from runtime_tests.chat.conversation import Conversation, End, NoRoomError
from runtime_tests.chat.kept_cache import KeptCache
from runtime_tests.chat.sampling import Sampler
from runtime_tests.session import open_session

from .conftest import reseal, set_fault

CONTEXT, SHORT = 256, 40
MESSAGES = ("hello", "and then?", "why")


def opened(folder):
    """On one thread: two would wait for each other on a busy machine."""
    return open_session(folder, manifest.read(folder), threads=1)


class Counting:
    """A session that writes down what it is asked."""

    def __init__(self, session):
        self.session, self.fed, self.rewinds = session, [], []

    def reset(self):
        self.session.reset()
        self.rewinds.append(0)

    def rewind(self, length):
        self.session.rewind(length)
        self.rewinds.append(length)

    def feed(self, tokens):
        self.fed.append(list(tokens))
        return self.session.feed(tokens)


@pytest.fixture
def words(built):
    return tokenizer.load(built)


@pytest.fixture(autouse=True)
def letters_only(monkeypatch, words):
    """The tiny model answers in letters: most of its tokens are no text by themselves, or none at all."""
    letters = words.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    others = np.setdiff1d(np.arange(512), letters)
    choose = Sampler.__call__

    def call(self, logits):
        if len(logits) == 512:
            logits[others] = logits.min() - 1000
        return choose(self, logits)

    monkeypatch.setattr(Sampler, "__call__", call)


@pytest.fixture
def short(artifact):
    """An artifact with a context of 40 tokens whose answers do not end."""
    contract = manifest.read(artifact).contract
    kv = contract.kv.model_copy(update={"context_length": SHORT})
    reseal(artifact, contract=contract.model_copy(update={"kv": kv}))
    return artifact


@pytest.fixture
def talk(built, words):
    """A conversation with the tiny model; without a cache of its own it gets a fresh session."""

    def begin(session=None, max_new_tokens=12, folder=built, choose=None):
        session = Counting(session or opened(folder))
        described = manifest.read(folder)
        choose = choose or Sampler(0, 1, None)
        return Conversation(
            KeptCache(session), words, described.tokenizer, described.contract.kv.context_length, choose, max_new_tokens
        )

    return begin


def ask(conversation, message, stopped=lambda: False):
    shown = []
    answer = conversation.ask(message, shown.append, stopped)
    assert "".join(shown) == answer.text
    return answer


# ── the kept cache ──────────────────────────────────────────────────────────────────────────────────────────────────


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
    kept = cache.feed(prompt[cache.share(prompt) :], lambda: False)
    fresh = opened(built).feed(prompt)
    assert np.abs(kept - fresh).max() < 1e-4 * np.abs(fresh).max()


def test_a_cache_that_is_not_rewound_gives_other_logits(talk, artifact):
    """The twin: the same comparison, with a session that keeps what it should forget."""
    set_fault(artifact, "rewinds nothing")
    conversation = talk(folder=artifact)
    ask(conversation, "hello")
    conversation.system = "Be brief."  # rewrites the past
    prompt = conversation.prompt([*conversation.turns, {"role": "user", "content": "why"}])
    cache = conversation.cache
    cache.tokens[:0] = prompt[:1]  # something in common, so that it is a rewind and no reset
    kept = cache.feed(prompt[cache.share(prompt) :], lambda: False)
    fresh = opened(artifact).feed(prompt)
    assert np.abs(kept - fresh).max() > 1e-2 * np.abs(fresh).max()


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
    monkeypatch.setattr(kept_cache, "PIECE", 10)
    conversation = talk(max_new_tokens=1)
    answer = ask(conversation, "a" * 25)
    assert [len(piece) for piece in conversation.cache.session.fed] == [10, 10, 8]
    assert answer.prefilled == 28


def test_a_message_that_is_stopped_while_it_is_read_is_left_out(talk, monkeypatch):
    monkeypatch.setattr(kept_cache, "PIECE", 10)
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
    with pytest.raises(NoRoomError, match=r"this conversation has 49 tokens, the artifact's context 40"):
        ask(conversation, "more")
    assert conversation.turns == turns
    conversation.reset()
    assert ask(conversation, "hello").text == answer.text


def test_a_prompt_that_fills_the_context_gets_one_token_and_one_more_is_refused(talk, short):
    conversation = talk(folder=short)
    answer = ask(conversation, "a" * (SHORT - 3))
    assert (answer.end, answer.decoded, answer.context_used) == (End.CONTEXT, 0, SHORT)
    conversation.reset()
    with pytest.raises(NoRoomError):
        ask(conversation, "a" * (SHORT - 2))


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


def test_half_a_character_at_the_end_is_neither_shown_nor_kept(talk, words):
    conversation = talk(choose=spelled("aü", words), max_new_tokens=2)
    answer = ask(conversation, "hello")
    assert (answer.text, answer.end) == ("a", End.LIMIT)
    assert conversation.turns[-1]["content"] == "a"


def test_special_tokens_are_not_shown(talk, words):
    conversation = talk(choose=spelled("a<|user|>b", words))
    assert ask(conversation, "hello").text == "ab"


# ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def chat(monkeypatch, capsys):
    """Runs the command with standard input; exit code, stdout, stderr."""

    def run(folder, *arguments, said=b""):
        monkeypatch.setattr(sys, "argv", ["runtime_tests", command.NAME, str(folder), *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(command.devices, "physical_threads", lambda: 1)
        code = run_app(command.app)
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return code, found.out, found.err

    return run


def test_piped_messages_are_answered_one_per_line(chat, built, talk):
    code, out, err = chat(built, "--max-new-tokens", "8", said=b"hello\r\n\nand then?")
    conversation = talk(max_new_tokens=8)
    assert out == "".join(ask(conversation, message).text + "\n" for message in ("hello", "and then?"))
    assert code == 0
    figures = [line for line in err.splitlines() if line.startswith("prefill")]
    assert len(figures) == 2
    assert "context " in figures[1]
    assert f"/{CONTEXT}" in figures[1]
    assert "TTFT" in figures[1]


def test_the_same_seed_gives_the_same_answer(chat, built):
    options = ("--max-new-tokens", "8", "--temperature", "1.5", "--seed")
    first, again, other = (chat(built, *options, seed, said=b"hello\n")[1] for seed in ("1", "1", "2"))
    assert first == again != other


def test_reset_system_and_exit_are_obeyed_and_unknown_commands_named(chat, built, talk):
    said = b"hello\n/reset\nhello\n/system Be brief.\nwhy\n/exit\nnever asked\n"
    code, out, err = chat(built, "--max-new-tokens", "8", said=said)
    conversation = talk(max_new_tokens=8)
    wanted = ask(conversation, "hello").text + "\n"
    conversation.system = "Be brief."
    wanted += wanted + ask(conversation, "why").text + "\n"
    assert (code, out) == (0, wanted)
    assert "the conversation begins anew" in err
    assert "system: Be brief." in err
    assert err.count("prefill") == 3
    code, out, err = chat(built, said=b"/sytem x\n/help\n")
    assert (code, out) == (1, "")
    assert "unknown command /sytem" in err
    assert "/system TEXT" in err


def test_a_system_message_given_with_the_command(chat, built, talk):
    _, out, _ = chat(built, "--system", "Be brief.", "--max-new-tokens", "8", said=b"hello\n")
    conversation = talk(max_new_tokens=8)
    assert out != ask(conversation, "hello").text + "\n"
    conversation.reset()
    conversation.system = "Be brief."
    assert out == ask(conversation, "hello").text + "\n"


def test_a_full_context_is_said_and_reset_goes_on(chat, short):
    code, out, err = chat(short, said=b"hello\nmore\n/reset\nhello\n")
    assert code == 1  # one message has no answer
    assert len(out.splitlines()) == 2
    assert err.count("context 40/40 · the context is full: /reset begins anew") == 2
    assert err.count("the message is left out, /reset begins anew") == 1


def test_the_evaluator_is_named_and_not_timed(chat, artifact):
    set_fault(artifact, "reference evaluator")
    code, _, err = chat(artifact, "--max-new-tokens", "2", said=b"hello\n")
    assert code == 0
    assert "the reference evaluator computes the same" in err
    assert "speed not measured: reference evaluator · context" in err
    assert "tok/s" not in err


BOMB = "{{ messages[0].content * (10 ** 10 if messages[0].content == 'hello' else 1) }}"
"""Of this one message only: the conversation with which a checkpoint's template is tried is written well."""


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "model.safetensors: differs from manifest"),
        (lambda folder: (folder / "chat_template.jinja").write_text("x"), "chat_template.jinja: differs from manifest"),
        (lambda folder: (folder / "new").write_text("x"), "new: not listed in manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda folder: set_fault(folder, "does not load"), "does not load: RuntimeError: the file is of a newer"),
        (lambda folder: set_template(folder, "{{ raise_exception('no such role') }}"), "chat template: .*no such role"),
        (
            lambda folder: set_template(folder, "{{ messages[0].content + 1 }}"),
            "chat template: TypeError",
        ),
        (lambda folder: set_template(folder, BOMB), "this message: chat template: took more than 256 MB"),
    ],
)
def test_a_damaged_artifact_is_refused_in_one_line(chat, artifact, damage, line):
    damage(artifact)
    code, out, err = chat(artifact, said=b"hello\n")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (1, "", 1)
    assert re.search(line, errors[0])


def set_template(folder, text):
    (folder / "chat_template.jinja").write_text(text)
    reseal(folder)


def test_an_artifact_without_a_chat_template(chat, artifact):
    fields = json.loads((artifact / manifest.FILE).read_text())
    fields["tokenizer"]["has_chat_template"] = False
    (artifact / manifest.FILE).write_text(json.dumps(fields))
    code, out, err = chat(artifact, said=b"hello\n")
    assert (code, out) == (1, "")
    assert "its tokenizer has no chat template; build it from an instruct model" in err


def test_options_that_contradict_and_input_that_is_no_text(chat, built):
    code, _, err = chat(built, "--top-p", "0.9", said=b"hello\n")
    assert code == 2
    assert "give a --temperature above 0" in err
    code, out, err = chat(built, said=b"hell\xff\n")
    assert (code, out) == (1, "")
    assert "error: standard input: not UTF-8" in err


@pytest.mark.parametrize(("target", "module"), [("onnx-cpu", "onnxruntime"), ("executorch-xnnpack", "executorch"),
                                                ("coreml", "coremltools")])  # fmt: skip
def test_every_format_talks_and_keeps_its_cache(chat, talk, tiny, target, module):
    pytest.importorskip(module, reason=f"{module} is not installed")
    folder = tiny(target)
    said = "".join(f"{message}\n" for message in MESSAGES[:2])
    code, out, _ = chat(folder, "--max-new-tokens", "6", said=said.encode())
    assert code == 0
    conversation = talk(folder=folder, max_new_tokens=6)
    answers = [ask(conversation, message) for message in MESSAGES[:2]]
    assert out == "".join(answer.text + "\n" for answer in answers)
    assert answers[1].prefilled == len(MESSAGES[1]) + 5
    conversation.cache = KeptCache(opened(folder))
    conversation.turns = conversation.turns[:2]
    fresh = ask(conversation, MESSAGES[1])
    assert fresh.prefilled > answers[1].prefilled
    assert fresh.text == answers[1].text
