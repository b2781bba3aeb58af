"""A hostile chat template ends in one line, in bounded memory and time, before an artifact holds it."""

import pytest

from export.checkpoints import chat_template, open_source, tokenizer
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host.processes import Limits
from tests.support.checkpoints import write_folder
from tests.support.processes import within

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


@pytest.mark.reliability("hostile chat templates", "one line, within the memory and processor time allowed")
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
    with pytest.raises(ExportError, match=r"^x: chat template: .*no default"):
        chat_template.render(loaded, chat_template.HELLO, "x")
    loaded.chat_template["default"] = "{{ eos_token }}"
    assert chat_template.render(loaded, chat_template.HELLO, "x") == loaded.eos_token
