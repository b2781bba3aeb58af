"""A hostile chat template ends in one line, in bounded memory and time, before an artifact holds it."""

import json
from datetime import datetime

import pytest

from export.checkpoints import chat_template, open_source, tokenizer
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host.processes import Limits
from export.plan import QuantRecipe, load_named
from export.quantization import texts
from tests.support.checkpoints import tokenizer_refusal, write_folder
from tests.support.processes import within
from tests.support.tokenizers import set_tokenizer_config

HOSTILE = {
    "class escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class escape by a filter": "{{ messages | attr('__class__') | attr('__mro__') }}{{ x.y.z }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('touch ran') }}",
    "format string": "{{ '{0.__class__.__mro__[1].__subclasses__}'.format(messages) }}{{ x.y.z }}",
    "changes the messages": "{{ messages.append(1) }}",
    "memory bomb": "{{ 'a' * 10**10 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x*2 %}{% endfor %}",
    "long answer": "{% for i in range(90000) %}{{ 'a' * 90 }}{% endfor %}",
    "wide range": "{% for i in range(10**9) %}{% endfor %}",
    "endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no template": "{% for %}",
    "an include": "{% include '/etc/passwd' %}",
}


def with_template(folder, text):
    write_folder(folder)
    (folder / "chat_template.jinja").write_text(text)
    return folder


@pytest.mark.hostile(
    "checkpoint",
    "chat templates that reach for Python, never end or grow",
    "one line, within the time and memory of a child",
)
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_template_is_refused(tmp_path, monkeypatch, attack):
    monkeypatch.setattr(chat_template, "LIMITS", Limits(cpu_s=1))
    monkeypatch.chdir(tmp_path)
    source = open_source(parse_origin(str(with_template(tmp_path / "checkpoint", HOSTILE[attack]))), None)
    (tmp_path / "out").mkdir()
    with within(30), pytest.raises(ExportError, match="chat template: ") as caught:
        tokenizer.write(source, tmp_path / "out", 288)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ["{{ messages }}", "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"]
)
def test_a_harmless_one_is_not(tmp_path, text):
    """The twin: a template within the limits is rendered as transformers renders it."""
    source = open_source(parse_origin(str(with_template(tmp_path / "checkpoint", text))), None)
    (tmp_path / "out").mkdir()
    assert tokenizer.write(source, tmp_path / "out", 288).has_chat_template
    loaded = tokenizer.load(tmp_path / "out")
    expected = loaded.apply_chat_template(list(chat_template.HELLO), tokenize=False, add_generation_prompt=True)
    assert chat_template.render(loaded, chat_template.HELLO, "x") == expected


def test_several_templates_without_a_default_are_one_line(tmp_path):
    write_folder(tmp_path)
    loaded = tokenizer.load(tmp_path)
    loaded.chat_template = {"rag": "x", "tools": "y"}
    with pytest.raises(
        ExportError, match=r"^x: chat template: there are several \(rag, tools\), but none is the default"
    ):
        chat_template.render(loaded, chat_template.HELLO, "x")
    loaded.chat_template["default"] = "{{ eos_token }}"
    assert chat_template.render(loaded, chat_template.HELLO, "x") == loaded.eos_token


CLOCK = "{{ strftime_now('%d %b %Y') }} {{ range(10**5) | random }} {{ range(10**5) | random }}"


def test_with_a_day_given_the_text_is_the_same_every_time(tmp_path):
    loaded = tokenizer.load(write_folder(tmp_path))
    loaded.chat_template = CLOCK
    dated = [chat_template.render(loaded, chat_template.HELLO, "x", chat_template.FIXED_DAY) for _ in range(2)]
    assert dated[0].startswith("26 Jul 2024 ")
    assert dated[0] == dated[1]
    before = datetime.now()
    text = chat_template.render(loaded, chat_template.HELLO, "x")
    assert text[:11] in {f"{day:%d %b %Y}" for day in (before, datetime.now())}
    assert text[11:] != dated[0][11:]


def test_text_for_calibration_is_of_a_fixed_day(tmp_path):
    loaded = tokenizer.load(write_folder(tmp_path))
    loaded.chat_template = "{{ strftime_now('%d %b %Y') }}"
    [ids] = texts.prompt_ids(["Hello"], loaded, "x")
    assert loaded.decode(ids) == "26 Jul 2024"
    generated = load_named(QuantRecipe, "quant", "int4-g32-gptq-chat").calibration
    assert texts.day(generated) == "2024-07-26"
    assert texts.day(load_named(QuantRecipe, "quant", "int4-g32-scales").calibration) is None


def test_further_templates_go_with_the_default_one(tmp_path):
    folder = write_folder(tmp_path / "checkpoint")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ bos_token }}")
    source = open_source(parse_origin(str(folder)), None)
    assert folder / "additional_chat_templates" / "rag.jinja" in source.files
    (tmp_path / "out").mkdir()
    tokenizer.write(source, tmp_path / "out", 288)
    assert tokenizer.load(tmp_path / "out").chat_template["rag"] == "{{ bos_token }}"


def test_further_templates_alone_are_named(tmp_path):
    folder = write_folder(tmp_path / "checkpoint")
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    for name in ("rag", "summary"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text("x")
    assert tokenizer_refusal(folder, tmp_path / "out") == (
        "the checkpoint's tokenizer: chat template: there are several (rag, summary), but none is the default; save "
        "one as chat_template.jinja"
    )


@pytest.mark.parametrize("other", ["{{ messages[0].content }}", [{"name": "default", "template": "x"}]])
def test_another_template_in_the_configuration_is_said_and_reaches_no_client(tmp_path, other):
    folder = write_folder(tmp_path / "checkpoint")
    set_tokenizer_config(folder, chat_template=other)
    (tmp_path / "out").mkdir()
    ids = tokenizer.write(open_source(parse_origin(str(folder)), None), tmp_path / "out", 288)
    assert ids.notes == (
        "chat_template.jinja is read, another template in tokenizer_config.json is not, as in transformers",
    )
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer.load(tmp_path / "out").chat_template == (folder / "chat_template.jinja").read_text()
