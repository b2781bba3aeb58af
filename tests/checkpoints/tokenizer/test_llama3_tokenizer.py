"""Llama 3.2's tokenizer as Hugging Face files: Meta's own ids, in every client that reads the files."""

import json

import pytest

from export.architecture import Architecture
from export.checkpoints import open_source, tokenizer
from export.checkpoints.origin import Package, parse_origin
from export.checkpoints.seed import SeededSource
from export.pipeline import export
from export.plan import load_plan
from export.toolbox import synth
from runtime_tests.evaluation import TEXT, read_text
from tests.support.checkpoints import write_gguf

pytest.importorskip("llama_models", reason="llama-models (Meta's own tokenizer) is not installed")

SPECIAL = {
    "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004,
    "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009,
    "<|python_tag|>": 128010, "<|image|>": 128011, "<|reserved_special_token_2|>": 128012,
    "<|reserved_special_token_245|>": 128255,
}  # fmt: skip
TEXTS = {
    "code": "def f(x: int) -> int:\n\tif x>=10:\n        return x**2  # don't, I'LL, we've\n\n\n",
    "digits": "1 12 123 1234 12345 3.14159 1e-5 0xff 2024-01-31 ½ ² ٣٤٥ १२३ ๑๒๓",
    "emoji": "🦙🏽‍🚀 🇹🇭 ❤️ 👩‍👩‍👧‍👦 \U0001f9ff",
    "whitespace": " a  b   c\t\td \n e\n\n\nf\r\n\r\ng \u00a0 h\u2003i   \n   ",
    "punctuation": "¿Qué? ...!!! «ça» — “q” 'x' #@%&*()_+={}[]|\\:;<>,./?~`",
    "contractions": "I'm you're he'd WE'LL They'Ve it'S",
    "scripts": "नमस्ते दुनिया สวัสดีชาวโลก 数学 русский العربية שלום ﷽ e\u0301",
    "not special": "<|begin_of_text and <|eot_id and |>",
    "long word": "x" * 3000 + " " * 300 + "y",
    "control": "\x00\x01\x7f\ufeff\u200b\ufffd",
}
DIALOGS = {
    "user": [("user", "What is 2 + 2?")],
    "system": [("system", "Be brief.\nAnswer in French."), ("user", "Größe?")],
    "turns": [
        ("system", "You are a poet."), ("user", "Hello"), ("assistant", "Hi! 🦙"), ("user", "Go on,\n\n  please")
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def meta():
    from llama_models.llama3.tokenizer import Tokenizer

    return Tokenizer.get_instance()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer.write_tiktoken(Package("llama_models", "llama3/tokenizer.model").path, folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    """Loaded from its files, as every user loads it."""
    return tokenizer.load(folder)


def texts():
    """Name → text: the eight languages of Llama 3.2, and texts that tokenizers get wrong."""
    return TEXTS | {path.stem: read_text(f"udhr/{path.name}") for path in sorted((TEXT / "udhr").glob("*.txt"))}


@pytest.mark.parametrize("name", texts())
def test_ids_are_those_of_metas_tokenizer(meta, ours, name):
    text = texts()[name]
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == meta.encode(text, bos=False, eos=False)
    assert ours.encode(text) == meta.encode(text, bos=True, eos=False)
    assert ours.decode(ids) == text


def test_all_eight_languages_are_there():
    assert set(texts()) >= {"de", "en", "es", "fr", "hi", "it", "pt", "th"}


def test_every_single_token_decodes_to_metas_bytes(meta, ours):
    """Each token is decoded alone; where its bytes are text, that text must give the same ids again."""
    step = 37
    for token in range(0, 128000, step):
        text = meta.model.decode_single_token_bytes(token).decode("utf-8", errors="replace")
        assert ours.decode([token]) == text
        if "\ufffd" not in text:
            assert ours.encode(text, add_special_tokens=False) == meta.encode(text, bos=False, eos=False)


def test_special_tokens_are_metas(meta, ours):
    assert {name: meta.special_tokens[name] for name in SPECIAL} == SPECIAL
    assert {name: ours.convert_tokens_to_ids(name) for name in meta.special_tokens} == meta.special_tokens
    assert all(ours.encode(name, add_special_tokens=False) == [token] for name, token in meta.special_tokens.items())
    assert len(ours) == meta.n_words == 128256
    assert (ours.bos_token_id, ours.eos_token_id) == (128000, 128009)


def metas_dialog(meta, dialog):
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat

    messages = [RawMessage(role=role, content=content) for role, content in dialog]
    return ChatFormat(meta).encode_dialog_prompt(messages).tokens


def ours_of(ours, dialog):
    messages = [{"role": role, "content": content} for role, content in dialog]
    return ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", DIALOGS)
def test_the_chat_template_gives_metas_prompt(meta, ours, name):
    text = ours_of(ours, DIALOGS[name])
    assert ours.encode(text, add_special_tokens=False) == metas_dialog(meta, DIALOGS[name])


@pytest.fixture(scope="module")
def from_gguf(folder, tmp_path_factory):
    """The same vocabulary and merges through a GGUF, as llama.cpp's converter writes them."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    vocab = fields["model"]["vocab"] | {token["content"]: token["id"] for token in fields["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    metadata = {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 128000 + [3] * 256,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in fields["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 128000,
        "tokenizer.ggml.eos_token_id": 128009,
        "tokenizer.chat_template": tokenizer.CHAT_TEMPLATE,
    }
    out = tmp_path_factory.mktemp("gguf")
    path = write_gguf(out / "model.gguf", extra=metadata)
    return tokenizer.write(open_source(parse_origin(str(path)), None), out, 128256), tokenizer.load(out)


def test_through_a_gguf_it_is_metas_tokenizer_too(meta, from_gguf):
    ids, loaded = from_gguf
    assert (ids.bos_id, ids.eos_ids, ids.has_chat_template) == (128000, (128001, 128008, 128009), True)
    for text in texts().values():
        assert loaded.encode(text) == meta.encode(text, bos=True, eos=False)
    for dialog in DIALOGS.values():
        assert loaded.encode(ours_of(loaded, dialog), add_special_tokens=False) == metas_dialog(meta, dialog)


# ── built end to end with the real vocabulary ───────────────────────────────────────────────────────────────────────

NARROW = Architecture(
    vocab_size=128256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rope_theta=500000.0,
    rope_scaling={
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
    },
    rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=131072,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    synth.write_random(SeededSource("1", NARROW), folder)
    return folder


@pytest.fixture(scope="module")
def onnx(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "out"
    return out, export(load_plan("llama", "int4-g32", "onnx-cpu"), parse_origin(str(checkpoint)), out)


def test_the_manifest_knows_the_three_ends_of_an_answer(onnx):
    ids = onnx[1].tokenizer
    assert (ids.bos_id, ids.eos_ids, ids.has_chat_template) == (128000, (128001, 128008, 128009), True)


def test_onnxruntime_genai_encodes_as_meta_does(onnx, meta, ours):
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    theirs = og.Tokenizer(og.Model(str(onnx[0])))
    for dialog in DIALOGS.values():
        assert theirs.encode(ours_of(ours, dialog)).tolist() == metas_dialog(meta, dialog)
    # plain text gets no first token from it, and ends at a NUL
    plain = {name: text.replace("\x00", "") for name, text in texts().items()}
    differ = [
        name for name, text in plain.items() if theirs.encode(text).tolist() != meta.encode(text, bos=False, eos=False)
    ]
    assert differ == []


def test_onnxruntime_genai_answers_a_chat(onnx, ours):
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(onnx[0]))
    theirs, prompt = og.Tokenizer(model), ours_of(ours, DIALOGS["system"])
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=60)
    generator = og.Generator(model, parameters)
    generator.append_tokens(theirs.encode(prompt))
    while not generator.is_done():
        generator.generate_next_token()
    answer = generator.get_sequence(0).tolist()
    assert answer[0] == 128000
    assert answer.count(128000) == 1
    assert theirs.decode(answer[-8:]) == ours.decode(answer[-8:], skip_special_tokens=True)


def test_the_executorch_artifact_knows_the_ids(checkpoint, tmp_path):
    pytest.importorskip("executorch", reason="executorch is not installed")
    from executorch.runtime import Runtime

    export(load_plan("llama", "int4-g32", "executorch-xnnpack"), parse_origin(str(checkpoint)), tmp_path / "out")
    program = Runtime.get().load_program(tmp_path / "out" / "model.pte")
    assert program.load_method("get_eos_ids").execute([]) == [128001, 128008, 128009]
    assert program.load_method("get_bos_id").execute([]) == [128000]
    assert program.load_method("get_vocab_size").execute([]) == [128256]
