"""A filled cache as a file: what comes back to the bit in every format, and what is refused in one line."""

import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import manifest
from runtime_tests.sessions import saved
from runtime_tests.sessions.base import CacheError, ContextError
from tests.sessions.test_base import CONTEXT, VOCAB, Remembering
from tests.support.artifacts import opened
from tests.support.fuzz import EDITS, count, fuzzed, only, spliced
from tests.support.scripts import random_tokens

ARTIFACT, OTHER = bytes(range(32)), bytes(32)
HEAD = 52
FORMATS = {
    "onnx": ("onnx-cpu", "int4-g32", None, 4),
    "onnx int8": ("onnx-cpu", "int4-g32", "int8", 1),
    "coreml": ("coreml", "int4-g32", None, 2),
    "pte": ("executorch-xnnpack", "int4-g32", None, 4),
    "pte bfloat16": ("executorch-xnnpack", "fp32", "bfloat16", 2),
    "pte int8": ("executorch-xnnpack", "fp32", "int8", 1 + 5 / 32),
}
"""Target, recipe, cache, bytes of a number in it: in `.pte` int8 has a zero and a scale for each head of 32."""


PIECES = {"coreml": 5e-3, "pte": 5e-2}
"""Of the logits' norm; else 1e-2. `.pte` in int4 rounds activations to int8, which a last bit of attention sets off."""


class Slots(Remembering):
    """Its cache can be read."""

    def buffers(self):
        return {"slots": self.slots[:, None]}


@pytest.fixture
def filled():
    session = Slots()
    session.feed(range(1, 30))
    return session


@pytest.fixture
def path(tmp_path, filled):
    saved.save(filled, tmp_path / "kept", ARTIFACT, b"a note")
    return tmp_path / "kept"


# ── what comes back ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", FORMATS)
def test_a_restored_cache_answers_to_the_bit_and_only_filled_slots_are_written(tiny, tmp_path, kind):
    target, recipe, cache, number_bytes = FORMATS[kind]
    folder = tiny(target, recipe, cache)
    artifact, session, path = bytes.fromhex(manifest.digest(folder)), opened(folder), tmp_path / "kept"
    session.feed(random_tokens(60))
    size = saved.save(session, path, artifact, b"note")
    kv = manifest.read(folder).contract.kv
    of_a_token = 4 + 2 * kv.layers * kv.kv_heads * kv.head_dim * number_bytes
    assert size == path.stat().st_size == HEAD + 60 * of_a_token + len("note") + 4
    expected = [session.feed([token]) for token in random_tokens(5, seed=5)]
    session.feed(random_tokens(100, seed=6))

    for other in (opened(folder), session):  # another process's, and one with another past
        assert saved.restore(other, path, artifact) == b"note"
        assert other.tokens == list(random_tokens(60))
        np.testing.assert_array_equal([other.feed([token]) for token in random_tokens(5, seed=5)], expected)
    session.rewind(59)
    assert np.abs(session.feed([7]) - expected[0]).max() > 0.1  # without it the logits are others


@pytest.mark.parametrize("kind", FORMATS)
def test_any_pieces_of_a_prompt_give_its_logits(tiny, kind):
    """Up to the rounding of kernels for one row and for many."""
    target, recipe, cache, _ = FORMATS[kind]
    session, tokens = opened(tiny(target, recipe, cache)), random_tokens(200)

    def logits(size, tokens=tokens):
        session.reset()
        return [session.feed(tokens[first : first + size]) for first in range(0, len(tokens), size)][-1]

    def difference(other):
        return np.linalg.norm(whole - other) / np.linalg.norm(whole)

    whole = logits(200)
    apart = [difference(logits(size)) for size in (199, 128, 64, 7, 2, 1)]
    assert max(apart) < PIECES.get(kind, 1e-2), apart
    assert difference(logits(200, tokens[1:])) > 0.1


def test_slots_are_written_by_name_and_what_does_not_fit_is_refused(filled):
    filled.write(3, {"slots": np.zeros((2, 1))})
    assert filled.slots[2:6].tolist() == [3, 0, 0, 6]
    for first, name, part, message in (
        (0, "keys", np.zeros((2, 1)), "no keys of float64"),
        (0, "slots", np.zeros((2, 1), np.float32), "no slots of float32"),
        (0, "slots", np.zeros((2, 2)), r"no slots of float64 \[2\] a slot"),
        (CONTEXT - 1, "slots", np.zeros((2, 1)), f"slots 39 to 41, the KV cache has {CONTEXT}"),
        (-1, "slots", np.zeros((2, 1)), "slots -1 to 1"),
    ):
        with pytest.raises(CacheError, match=message):
            filled.write(first, {name: part})
    with pytest.raises(saved.SavedError, match="does not give its KV cache"):
        saved.save(Remembering(), "never", ARTIFACT)


def test_an_empty_cache_and_a_full_one_come_back(tmp_path):
    for tokens in ([], [5] * CONTEXT):
        session, other = Slots(), Slots()
        if tokens:
            session.feed(tokens)
        saved.save(session, tmp_path / "kept", ARTIFACT)
        other.feed([1, 2])
        assert saved.restore(other, tmp_path / "kept", ARTIFACT) == b""
        assert other.tokens == tokens


@pytest.mark.parametrize("length", [-1, 30])
def test_no_rewind_to_what_was_never_fed(filled, length):
    with pytest.raises(ContextError, match=f"no rewinding to {length} tokens: the cache holds 29"):
        filled.rewind(length)
    assert filled.position == 29


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def sealed(data):
    """Damaged data whose checksum is right."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def with_number(at, value):
    return lambda data: sealed(data[:at] + struct.pack("<I", value) + data[at + 4 :])


BAD = {
    "empty": (lambda _: b"", "no saved session"),
    "text": (lambda _: b"hello\n" * 99, "no saved session"),
    "its head alone": (lambda data: data[:50], "no saved session"),
    "another version": (with_number(8, 2), "of version 2, this program reads 1; save it again"),
    "another artifact": (lambda data: data[:12] + OTHER + data[44:], r"another artifact \(manifest 000000000000, this"),
    "longer than the context": (
        with_number(44, CONTEXT + 1),
        f"{CONTEXT + 1} tokens, the KV cache has room for {CONTEXT}",
    ),
    "very long": (with_number(44, 2**32 - 1), "4294967295 tokens, the KV cache has room for"),
    "a longer note": (with_number(48, 2**32 - 1), "damaged: 410 bytes instead of 4294967699; copy or save it again"),
    "cut off": (lambda data: data[:-1], "damaged: 409 bytes instead of 410"),
    "something behind": (lambda data: data + b"x", "damaged: 411 bytes instead of 410"),
    "a flipped bit": (lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], "damaged: its CRC-32 is another"),
    "an unknown token": (with_number(HEAD, VOCAB), f"damaged: token {VOCAB}, the vocabulary has {VOCAB}"),
}


@pytest.mark.parametrize("harm", BAD)
def test_a_bad_file_is_one_line_and_the_cache_stays(path, filled, harm):
    change, message = BAD[harm]
    path.write_bytes(change(path.read_bytes()))
    filled.feed([50])
    with pytest.raises(saved.SavedError, match=message) as refused:
        saved.restore(filled, path, ARTIFACT)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
    assert filled.tokens == [*range(1, 30), 50]


def test_what_is_no_file_is_refused_and_a_pipe_is_not_waited_for(filled, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("nothing", "no such file"), ("pipe", "no file"), (".", "no file")):
        with pytest.raises(saved.SavedError, match=message):
            saved.restore(filled, tmp_path / name, ARTIFACT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "is there and no saved session; choose another name"),
        (".", "is there and no saved session"),
        ("no-folder/kept", "cannot be written: No such file or directory"),
        ("x" * 255, "cannot be written: File name too long"),
    ],
)
def test_only_a_saved_session_is_replaced(filled, tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(saved.SavedError, match=message):
        saved.save(filled, tmp_path / name, ARTIFACT)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_written_whole_or_not_at_all(path, filled, monkeypatch):
    before = path.read_bytes()
    filled.feed([50])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saved.Path, "replace", full)
        with pytest.raises(saved.SavedError, match="cannot be written: No space left on device"):
            saved.save(filled, path, ARTIFACT)
    assert [file.name for file in path.parent.iterdir()] == ["kept"]
    assert path.read_bytes() == before
    saved.save(filled, path, ARTIFACT)
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o600  # it tells what was said


@pytest.mark.fuzz
@pytest.mark.hostile("session", "saved sessions made by chance", "restored, or one line")
def test_files_made_by_chance(path, tmp_path, record_property):
    good, refused = path.read_bytes(), []

    @fuzzed
    @given(EDITS, st.booleans())
    def check(edits, seal):
        data = spliced(good, edits)
        path.write_bytes(sealed(data) if seal else data)
        session = Slots()
        refused.append(only(saved.SavedError, saved.restore, session, path, ARTIFACT))
        assert session.position == (0 if refused[-1] else 29)

    check()
    count(refused, record_property)
