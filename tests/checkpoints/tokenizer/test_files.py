"""The ids of an artifact are those of tokenizer.json, whatever stands beside it, and none is beyond the model."""

import json

import pytest
from tokenizers import Tokenizer, processors

from export.checkpoints import open_source, tokenizer
from export.checkpoints.origin import parse_origin
from tests.support.checkpoints import tokenizer_refusal, write_folder
from tests.support.processes import within
from tests.support.reliability import RUNTIME_TOKENIZER
from tests.support.tokenizers import ADDS_BOS, SHAPES, set_tokenizer_config, write_family

pytestmark = RUNTIME_TOKENIZER

CLASSES = {
    "llama3": ("GPT2Tokenizer",),  # seconds for each
    "smollm2": ("GPT2Tokenizer", "LlamaTokenizer"),
    "fallback": (
        None, "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "CodeLlamaTokenizer", "Unknown"
    ),
}  # fmt: skip


def written(folder, tmp_path, vocab_size=288):
    out = tmp_path / "written"
    out.mkdir(exist_ok=True)
    return tokenizer.write(open_source(parse_origin(str(folder)), None), out, vocab_size), out


@pytest.fixture(scope="module", params=SHAPES)
def family(request, tmp_path_factory):
    if request.param == "llama3":
        pytest.importorskip("llama_models", reason="llama-models (Meta's own tokenizer) is not installed")
    return request.param, write_family(tmp_path_factory.mktemp("family") / request.param, request.param)


def test_ids_and_text_are_those_of_the_file_whatever_class_is_named(family, tmp_path):
    from transformers import AutoTokenizer

    kind, folder = family
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name in CLASSES[kind]:
        set_tokenizer_config(folder, tokenizer_class=name, auto_map={"AutoTokenizer": ["code.Own", None]})
        ids, out = written(folder, tmp_path, SHAPES[kind].vocab_size)
        assert (ids.adds_bos, ids.notes) == (ADDS_BOS[kind], ())
        assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        for loaded in (tokenizer.load(out), AutoTokenizer.from_pretrained(out)):
            for text in tokenizer.SAMPLES:
                plain = loaded.encode(text, add_special_tokens=False)
                assert plain == file.encode(text, add_special_tokens=False).ids
                assert loaded.encode(text) == file.encode(text).ids
                assert loaded.decode(plain) == file.decode(plain, skip_special_tokens=False)


@pytest.mark.hostile("checkpoint", "settings of a tokenizer that lead out of the folder", "in no artifact")
def test_another_file_that_the_configuration_names_is_not_taken(tmp_path):
    folder = write_folder(tmp_path / "checkpoint")
    other = json.loads((folder / "tokenizer.json").read_text())
    other["added_tokens"][0]["content"] = "<|other|>"
    (folder / "tokenizer.4.0.0.json").write_text(json.dumps(other))
    set_tokenizer_config(folder, fast_tokenizer_files=["tokenizer.4.0.0.json"])
    assert tokenizer.load(written(folder, tmp_path)[1]).convert_ids_to_tokens(256) == "<|begin|>"


@pytest.mark.hostile("checkpoint", "settings of a tokenizer that lead out of the folder", "in no artifact")
@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "auto_map", "init_inputs"])
def test_what_leads_out_of_the_folder_is_in_no_artifact(tmp_path, key):
    folder = write_folder(tmp_path / "checkpoint")
    set_tokenizer_config(folder, **{key: ["/etc/passwd"]})
    _, out = written(folder, tmp_path)
    assert key not in json.loads((out / "tokenizer_config.json").read_text())


NAMES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@pytest.mark.hostile(
    "checkpoint", "links out of the folder, files of a terabyte in holes", "refused, nothing of them read or copied"
)
@pytest.mark.parametrize(
    "name", [*NAMES, "special_tokens_map.json", "added_tokens.json", "additional_chat_templates/x.jinja"]
)
def test_a_file_with_holes_is_not_copied(tmp_path, name):
    """A terabyte that takes no room, but its copy does."""
    folder = write_folder(tmp_path / "checkpoint")
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("ab") as file:
        file.truncate(2**40)
    assert (
        tokenizer_refusal(folder, tmp_path / "out")
        == f"{folder / name}: larger than 134217728 bytes, which no such file is"
    )


def test_special_tokens_of_a_text_stay_whole_as_in_every_client(tmp_path):
    folder = write_folder(tmp_path / "checkpoint")
    set_tokenizer_config(folder, split_special_tokens=True)
    assert tokenizer.load(written(folder, tmp_path)[1]).encode("<|begin|>a") == [256, 64]


@pytest.mark.parametrize(
    ("around", "adds", "note"),
    [
        ("$A", False, None),
        ("<|begin|> $A", True, None),
        ("<|begin|> $A <|end|>", True, "'<|begin|>' before and '<|end|>' behind a text, not BOS alone; {} put BOS"),
        ("$A <|end|>", False, "'' before and '<|end|>' behind a text, not BOS alone; {} put nothing"),
        ("<|begin|> <|begin|> $A", True, "'<|begin|><|begin|>' before and '' behind a text, not BOS alone; {} put BOS"),
        ("<|user|> $A", False, "'<|user|>' before and '' behind a text, not BOS alone; {} put nothing"),
    ],
)
def test_what_is_put_around_a_text_is_bos_or_said(tmp_path, around, adds, note):
    folder = write_folder(tmp_path / "checkpoint")
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [("<|begin|>", 256), ("<|end|>", 257), ("<|user|>", 259)]
    file.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    file.save(str(folder / "tokenizer.json"))
    ids, _ = written(folder, tmp_path)
    line = f"tokenizer.json puts {(note or '').format('onnxruntime-genai and ExecuTorch')} before it"
    assert (ids.adds_bos, ids.notes) == (adds, () if note is None else (line,))


# ── a tokenizer that is longer than the model ───────────────────────────────────────────────────────────────────────


def test_an_added_token_beyond_the_model_is_said(tmp_path):
    folder = write_folder(tmp_path / "checkpoint")
    loaded = tokenizer.load(folder)
    loaded.add_special_tokens({"pad_token": "[PAD]"})
    loaded.save_pretrained(folder)
    ids, _ = written(folder, tmp_path, vocab_size=261)
    assert ids.pad_id is None
    assert ids.notes == (
        "the tokenizer has '[PAD]' = 261 beyond the model's vocab_size 261: never an answer, and refused in a prompt",
    )
    assert written(folder, tmp_path, vocab_size=262)[0].notes == ()


@pytest.mark.parametrize("fields", [{"pad_token": "[PAD]"}, {"extra_special_tokens": ["[PAD]"]}])
def test_a_token_that_only_the_configuration_adds_reaches_every_client(tmp_path, fields):
    folder = write_folder(tmp_path / "checkpoint")
    set_tokenizer_config(folder, **fields)
    ids, out = written(folder, tmp_path)
    assert ids.notes == (
        "the files beside the checkpoint's tokenizer.json change the token '[PAD]'; the artifact's tokenizer.json is "
        "as transformers reads them all",
    )
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("a[PAD]").ids == [64, 261]


def set_token(folder, token, number):
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"][token] = number
    path.write_text(json.dumps(fields))


def test_a_hole_is_fine_inside_the_model_and_refused_beyond_it(tmp_path):
    folder = write_folder(tmp_path / "checkpoint")
    set_token(folder, "b", 270)
    assert written(folder, tmp_path)[0].notes == ()
    set_token(folder, "b", 4000)
    line = f"{folder}/tokenizer.json: token 'b' has id 4000, but the model's vocab_size is 288; give the tokenizer of "
    assert tokenizer_refusal(folder, tmp_path / "out").startswith(line)


@pytest.mark.parametrize("fields", [{"pad_token": "[PAD]"}, {"extra_special_tokens": ["b"]}])
def test_an_id_that_no_vocabulary_has_is_refused_before_a_file_is_written(tmp_path, fields):
    folder = write_folder(tmp_path / "checkpoint")
    set_token(folder, "b", 2**31)
    set_tokenizer_config(folder, **fields)
    with within(10):
        assert "token 'b' has id 2147483648, but the model's" in tokenizer_refusal(folder, tmp_path / "out")


def test_a_template_that_writes_a_token_beyond_the_model_is_refused(tmp_path):
    folder = write_folder(tmp_path / "checkpoint")
    loaded = tokenizer.load(folder)
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    loaded.chat_template = "<|im_start|>{{ messages[0].content }}"
    loaded.save_pretrained(folder)
    line = (
        f"{folder}/tokenizer.json: the chat template writes '<|im_start|>', id 261, but the model's vocab_size is 261"
    )
    assert tokenizer_refusal(folder, tmp_path / "out", 261).startswith(line)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[]", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"])
def test_a_broken_file_is_named_as_its_owner_knows_it(tmp_path, name, content):
    folder = write_folder(tmp_path / "checkpoint")
    (folder / name).write_text(content)
    assert tokenizer_refusal(folder, tmp_path / "out").startswith(f"{folder / name}: ")


MARK = "it begins with a byte order mark; save it as UTF-8 without one"
MARKS = {"utf-8-sig": MARK, "utf-16": MARK}


@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_text_that_an_editor_saved_otherwise_is_named(tmp_path, name, encoding):
    path = write_folder(tmp_path / "checkpoint") / name
    text = path.read_text() if path.is_file() else '{"eos_token_id": 257}'
    path.write_text(text, encoding=encoding)
    line = tokenizer_refusal(path.parent, tmp_path / "out")
    assert line.startswith(f"{path}: ")
    assert MARKS[encoding] in line


def test_a_text_that_is_not_utf_8_is_named(tmp_path):
    path = write_folder(tmp_path / "checkpoint") / "chat_template.jinja"
    path.write_bytes("{{ messages }}é".encode("latin-1"))
    assert tokenizer_refusal(path.parent, tmp_path / "out") == f"{path}: it is not UTF-8 at byte 14"


@pytest.mark.parametrize(
    "fields",
    [
        *({"eos_token": 257}, {"chat_template": [{"name": "default"}]}, {"padding_side": "top"}),
        *({"model_max_length": value} for value in ([], "x")),
    ],
)
def test_what_transformers_does_not_take_is_named_by_its_file(tmp_path, fields):
    folder = write_folder(tmp_path / "checkpoint")
    set_tokenizer_config(folder, **fields)
    (folder / "chat_template.jinja").unlink()
    line = f"{folder}/tokenizer_config.json: tokenizer files do not load ("
    assert tokenizer_refusal(folder, tmp_path / "out").startswith(line)
