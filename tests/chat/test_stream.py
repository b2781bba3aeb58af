"""What is shown of an answer, joined, is what the tokenizer decodes the whole answer to."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from export.checkpoints import tokenizer
from runtime_tests.chat.stream import TextStream
from tests.support.checkpoints import write_meta
from tests.support.reliability import CONVERSATION

pytestmark = CONVERSATION

BROKEN = "\N{REPLACEMENT CHARACTER}"


def byte_level():
    """A token for each byte, one of the text 日本 and one that is special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_tokens(["日本"])
    made.add_special_tokens(["</s>"])
    return made


def byte_fallback():
    """Llama 2's kind: ▁ for spaces, <0x00>… for bytes, the first space of a text is not its own."""
    names = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "é"]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["</s>"])
    return made


@pytest.fixture(scope="module", params=["byte level", "byte_fallback", "Llama 3"])
def decoding(request, tmp_path_factory):
    if request.param == "Llama 3":
        folder = tmp_path_factory.mktemp("meta")
        write_meta(folder)
        tokenizer.write_tiktoken(folder / "tokenizer.model", folder)
        return tokenizer.load(folder).backend_tokenizer
    return {"byte level": byte_level, "byte_fallback": byte_fallback}[request.param]()


def shown_of(words, ids):
    """The pieces after each token, then the one at the end."""
    shown, pieces = [], []
    stream = TextStream(words, shown.append)
    for token in ids:
        stream.add(token)
        pieces.append("".join(shown))
        shown.clear()
    stream.end()
    assert stream.text == words.decode(ids)
    return [*pieces, "".join(shown)]


def test_any_tokens_are_shown_as_they_are_decoded(decoding):
    draw = random.Random(1)
    for _ in range(1000):  # ids beyond the tokenizer too: a model may have more
        ids = [draw.randrange(decoding.get_vocab_size() + 2) for _ in range(draw.randrange(1, 40))]
        assert "".join(shown_of(decoding, ids)) == decoding.decode(ids)


def named(words, *names):
    return [words.token_to_id(name) for name in names]


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (["▁a", "▁a", "é"], ["a", " a", "é", ""]),  # nothing is held back without a reason
        (["<0xE6>", "<0x97>", "<0xA5>", "a"], ["", "", "", "日a", ""]),
        (["<0xE6>", "<0x97>", "<0xA5>"], ["", "", "", "日"]),
        (["<0xE6>", "</s>", "<0x97>", "<0xA5>", "</s>", "a"], ["", "", "", "", "", "日a", ""]),
        (["a", "<0xE6>", "<0x97>"], ["a", "", "", 2 * BROKEN]),
        (["<0xE6>", "<0x97>", "<0xA5>", "<0xFF>", "a"], ["", "", "", "", 4 * BROKEN + "a", ""]),
    ],
)
def test_a_run_of_bytes_is_one_text(tokens, pieces):
    words = byte_fallback()
    assert shown_of(words, named(words, *tokens)) == pieces


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        ("aü".encode(), ["a", "", "ü", ""]),
        (b"a\xf0\x9f\x98", ["a", "", "", "", BROKEN]),
        (b"\xe6\x97Ab", ["", "", BROKEN + "A", "b", ""]),
        (b"\xffa", ["", BROKEN + "a", ""]),
    ],
)
def test_half_a_character_waits_for_the_rest_and_is_marked_where_it_does_not_come(data, pieces):
    words, letters = byte_level(), bytes_to_unicode()
    assert shown_of(words, named(words, *(letters[byte] for byte in data))) == pieces
