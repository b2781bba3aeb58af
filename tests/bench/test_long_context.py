"""The streams that show what a cache costs far into a context, and the page of what they showed."""

from types import SimpleNamespace

import numpy as np
import pytest

from export.errors import ExportError
from export.manifest import KVLayout
from export.plan import Target, load_named, names
from runtime_tests.bench import publish
from runtime_tests.bench.studies import long_context
from runtime_tests.device_runner import Feed, Logits

PLACES = (1000, 2000)
LETTERS = SimpleNamespace(encode=lambda text, add_special_tokens: [ord(c) for c in text], bos_token_id=None)


@pytest.fixture(autouse=True)
def no_bos(monkeypatch):
    monkeypatch.setattr("export.checkpoints.tokenizer.adds_bos", lambda _tokenizer: False)
    monkeypatch.setattr(long_context, "_READ", 32)


def test_each_fact_is_told_once_far_before_its_question():
    made = long_context.stream(LETTERS, "lorem ipsum " * 200, PLACES, 7)
    text = "".join(map(chr, made.tokens))
    assert len(text) == 2000
    for place in PLACES:
        assert [len(answer) for answer in made.answers[place]] == [5] * 4
        for share, (start, *_, last) in zip((0.1, 0.35, 0.6, 0.85), made.answers[place], strict=True):
            question = text[text.rfind("\n", 0, start) + 1 : last + 1]
            assert question.startswith("The code of ")
            assert text.count(question) == 2
            assert text.find(question) == pytest.approx(share * place, abs=60)
            assert place - 130 < start < place
        of_text = "".join(text[i] for i in made.text[place])
        assert len(of_text) == 32
        assert "code" not in of_text


def test_logits_are_asked_for_before_each_token_that_is_read():
    made = long_context.stream(LETTERS, "lorem ipsum " * 200, PLACES, 7)
    fed, asked = 0, []
    for command in made.script():
        fed += len(command.tokens) if isinstance(command, Feed) else 0
        asked += [fed] if isinstance(command, Logits) else []
    assert asked == made.read == sorted({*made.read})


def test_a_text_that_is_too_short_is_told():
    with pytest.raises(ExportError, match="the text has 12 tokens; 2000 are read"):
        long_context.stream(LETTERS, "lorem ipsum ", PLACES, 7)


def test_a_reader_that_forgets_finds_nothing_and_loses_more():
    made = long_context.stream(LETTERS, "lorem ipsum " * 200, PLACES, 7)
    perfect = np.zeros((len(made.read), 256), np.float32)
    perfect[range(len(made.read)), [made.tokens[i] for i in made.read]] = 9
    far = [i >= 1000 for i in made.read]
    forgetful = np.where(np.array(far)[:, None], 0, perfect)
    near, later = long_context._judged([made], [forgetful], [perfect], [perfect]).values()
    assert (near.found, later.found) == (4, 0)
    assert near.kl == pytest.approx(0, abs=1e-9)
    assert later.kl > 3
    assert later.perplexity == pytest.approx(256)
    assert later.perplexity > 2 * near.perplexity


def test_the_committed_page_is_that_of_its_record():
    record = publish.DOCS / "long-context.json"
    study = long_context.LongContext.model_validate_json(record.read_bytes())
    assert record.with_suffix(".md").read_text(encoding="utf-8") == long_context.page(study)
    assert record.with_suffix(".svg").read_text(encoding="utf-8") == long_context.figure(study)


def test_every_kind_and_policy_of_a_runtime_that_reads_fast_is_compared(monkeypatch):
    asked = {
        name: list(long_context._asked_for(load_named(Target, "targets", name), 8192)) for name in names("targets")
    }
    assert asked["onnx-cpu"] == [
        (8192, "float32", None),
        (8192, "int8", None),
        (8192, None, "window-1024"),
        (2048, None, "sink-4"),
    ]
    assert asked["coreml"] == []
    monkeypatch.setattr("sys.platform", "darwin")
    assert list(long_context._asked_for(load_named(Target, "targets", "coreml"), 2048)) == [
        (2048, "float16", None),
        (2048, None, "window-1024"),
    ]


def test_a_cache_is_named_with_its_policy():
    kv = KVLayout(kind="io", dtype="float32", layers=1, kv_heads=1, head_dim=2, context_length=2048)
    assert long_context._words(kv) == "float32"
    assert long_context._words(kv.model_copy(update={"window": 1024})) == "float32, window of 1,024"
    assert long_context._words(kv.model_copy(update={"sink": 4})) == "float32, 2,048 slots, the first 4 stay"
