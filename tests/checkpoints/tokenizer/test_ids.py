"""Special ids: every end of an answer that any file or the template names, the same list for every runtime."""

import json

import pytest

from export.checkpoints import open_source, tokenizer
from export.checkpoints.origin import adapted, parse_origin
from tests.support.checkpoints import set_config, tokenizer_refusal, write_folder, write_gguf, write_lora
from tests.support.reliability import DISAGREEMENT
from tests.support.tokenizers import set_tokenizer_config

pytestmark = DISAGREEMENT

TURNS = "{% for m in messages %}<|user|>{{ m.content }}{{ end }}{% endfor %}"
"""Of the byte tokenizer of tests: <|begin|> 256, <|end|> 257, <|system|> 258, <|user|> 259, <|assistant|> 260."""


def written(origin, tmp_path, vocab_size=288):
    out = tmp_path / "written"
    out.mkdir()
    return tokenizer.write(open_source(origin, None), out, vocab_size), out


def checkpoint(tmp_path, *, config=None, generation=None, template=None, **fields):
    folder = write_folder(tmp_path / "checkpoint")
    set_config(folder, **config or {})
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    set_tokenizer_config(folder, **fields)
    return parse_origin(str(folder))


@pytest.mark.parametrize(
    ("places", "ends"),
    [
        ({}, (257,)),
        ({"config": {"eos_token_id": [257, 258, 259]}}, (257, 258, 259)),
        ({"config": {"eos_token_id": 258}}, (257, 258)),
        ({"config": {"eos_token_id": None}}, (257,)),
        ({"generation": {"eos_token_id": 256}}, (256, 257)),
        ({"generation": {"eos_token_id": [260, 258]}, "config": {"eos_token_id": 259}}, (257, 258, 259, 260)),
        ({"generation": {"eos_token_id": []}}, (257,)),
        ({"config": {"eos_token_id": 258}, "eos_token": None, "template": ""}, (258,)),
    ],
)
def test_the_ends_of_an_answer_are_joined(tmp_path, places, ends):
    ids, out = written(checkpoint(tmp_path, **places), tmp_path)
    assert ids.eos_ids == ends
    assert ids.notes == ()
    loaded = tokenizer.load(out)  # clients that read one file alone
    assert loaded.eos_token_id in ends
    generation = out / "generation_config.json"
    stated = json.loads(generation.read_text())["eos_token_id"] if generation.is_file() else [loaded.eos_token_id]
    assert sorted(stated) == list(ends)


@pytest.mark.parametrize(
    ("end", "ends", "note"),
    [
        ("<|end|>", (257,), None),
        (" <|end|>\n", (257,), None),
        (
            "<|assistant|>\n", (257, 260),
            "the chat template ends an answer with '<|assistant|>', which no other file calls an end; it is one here",
        ),
        (
            "\n\n### ", (257,),
            "the chat template ends an answer with '###', which is no single token: an answer may run on; stop at that "
            "text",
        ),
        (
            "</s>", (257,),
            "the chat template ends an answer with '</s>', which is no single token: an answer may run on; stop at "
            "that text",
        ),
    ],
)  # fmt: skip
def test_what_the_template_ends_an_answer_with(tmp_path, end, ends, note):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
    ids, _ = written(checkpoint(tmp_path, template=template.replace("{{ m.role }}: ", "")), tmp_path)
    assert (ids.eos_ids, ids.notes) == (ends, () if note is None else (note,))


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (
            "{{ messages[-1].content }}",
            "what ends an answer is unknown: the chat template leaves out an earlier one",
        ),
        (
            "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}",
            "what ends an answer is unknown: the checkpoint's tokenizer: chat template: TemplateError: one turn",
        ),
    ],
)
def test_a_template_that_does_not_show_it(tmp_path, template, note):
    ids, _ = written(checkpoint(tmp_path, template=template), tmp_path)
    assert (ids.eos_ids, ids.notes) == ((257,), (note,))


def test_an_end_that_any_text_may_hold_is_said(tmp_path):
    """As the defaults of a config.json that knows nothing of the tokenizer."""
    ids, _ = written(checkpoint(tmp_path, config={"eos_token_id": 2}), tmp_path)
    assert ids.eos_ids == (2, 257)
    assert ids.notes == ("config.json ends answers at 2, which is '#', a token of ordinary text",)


@pytest.mark.parametrize(
    ("places", "line"),
    [
        ({"config": {"eos_token_id": [257, 4711]}}, "/config.json: eos_token_id 4711 is not one of 288 tokens"),
        ({"config": {"eos_token_id": "</s>"}}, "/config.json: eos_token_id '</s>' is not one of 288 tokens"),
        ({"config": {"bos_token_id": True}}, "/config.json: bos_token_id True is not one of 288 tokens"),
        ({"generation": {"eos_token_id": -1}}, "/generation_config.json: eos_token_id -1 is not one of 288 tokens"),
        ({"generation": {"bos_token_id": 288}}, "/generation_config.json: bos_token_id 288 is not one of 288 tokens"),
        ({"eos_token": "<new>"}, "/tokenizer_config.json: eos_token 261 is not one of 261 tokens"),
        ({"eos_token": None, "template": ""}, "/tokenizer_config.json: the tokenizer has no end-of-sequence token"),
    ],
)  # fmt: skip
def test_an_id_that_is_no_token_is_refused_by_its_file(tmp_path, places, line):
    origin = checkpoint(tmp_path, **places)
    size = 261 if "eos_token" in places else 288
    assert tokenizer_refusal(origin.path, tmp_path / "out", size).startswith(f"{origin.path}{line}")


def test_a_bos_that_is_stated_twice_is_the_tokenizers(tmp_path):
    ids, _ = written(checkpoint(tmp_path, config={"bos_token_id": 1}, generation={"bos_token_id": 256}), tmp_path)
    assert ids.bos_id == 256
    assert ids.notes == ("bos is 256, bos_token of the tokenizer; config.json says 1",)


def test_special_tokens_that_two_files_name_are_joined_or_said(tmp_path):
    origin = checkpoint(tmp_path)
    (origin.path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|user|>", "bos_token": {"content": "<|system|>"}})
    )
    ids, out = written(origin, tmp_path)
    assert (ids.bos_id, ids.eos_ids) == (tokenizer.load(out).bos_token_id, (257, 259))
    assert ids.notes == ("bos is 258, bos_token of the tokenizer; tokenizer_config.json says 256",)


@pytest.mark.parametrize(("stated", "pad"), [(258, 258), (-1, None), (4711, None), (None, None)])
def test_a_pad_that_the_model_lacks_is_none(tmp_path, stated, pad):
    ids, _ = written(checkpoint(tmp_path, config={"pad_token_id": stated}), tmp_path)
    assert (ids.pad_id, ids.notes) == (pad, ())


@pytest.mark.parametrize(
    ("keys", "ends"),
    [({}, (260,)), ({"eot": 261}, (260, 261)), ({"eot": 259, "eom": 261}, (259, 260, 261)), ({"eot": 260}, (260,))],
)
def test_a_gguf_has_three_keys_for_ends(tmp_path, keys, ends):
    extra = {f"tokenizer.ggml.{kind}_token_id": number for kind, number in keys.items()}
    path = write_gguf(tmp_path / "model.gguf", extra=extra)
    assert written(parse_origin(str(path)), tmp_path)[0].eos_ids == ends


def test_a_key_of_a_gguf_that_names_no_token(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", extra={"tokenizer.ggml.eot_token_id": 262})
    line = f"{path}: metadata key tokenizer.ggml.eot_token_id is 262, the file has 262 tokens"
    assert tokenizer_refusal(path, tmp_path / "out") == line


def test_with_an_adapter_the_bases_config_counts_too(tmp_path):
    folder = write_lora(tmp_path / "base")
    set_config(folder, eos_token_id=258)
    ids, _ = written(adapted(parse_origin(str(folder)), folder / "adapter"), tmp_path)
    assert ids.eos_ids == (257, 258)
