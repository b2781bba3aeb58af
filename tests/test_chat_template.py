"""A hostile chat template ends in one line, in bounded memory and time, before an artifact holds it."""

import os
import signal
import time

import pytest

from export import chat_template, limited, tokenizer
from export.errors import ExportError
from export.sources import open_source

from .checkpoints import write_folder
from .harm import within

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
    """A checkpoint's folder with that template."""
    write_folder(folder)
    (folder / "chat_template.jinja").write_text(text)
    return folder


@pytest.mark.reliability("hostile chat templates", "one line, within the memory and processor time allowed")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_template_is_refused(tmp_path, monkeypatch, what):
    monkeypatch.setattr(limited, "CPU_S", 1)
    monkeypatch.chdir(tmp_path)
    source = open_source(str(with_template(tmp_path / "checkpoint", HOSTILE[what])), None)
    (tmp_path / "out").mkdir()
    with within(30), pytest.raises(ExportError, match="chat template: ") as caught:
        tokenizer.write(source, tmp_path / "out", 288)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ["{{ messages }}", "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"]
)
def test_a_harmless_one_is_not(tmp_path, text):
    """The twin."""
    source = open_source(str(with_template(tmp_path / "checkpoint", text)), None)
    (tmp_path / "out").mkdir()
    assert tokenizer.write(source, tmp_path / "out", 288).has_chat_template
    loaded = tokenizer.load(tmp_path / "out")
    wanted = loaded.apply_chat_template(list(chat_template.HELLO), tokenize=False, add_generation_prompt=True)
    assert chat_template.render(loaded, chat_template.HELLO, "x") == wanted


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"x: ended without an answer \(SIGKILL\)"),
        (lambda: os._exit(3), r"x: ended without an answer \(exit 3\)"),
        (lambda: time.sleep(60), "x: did not end"),
        (lambda: bytearray(2**30) and "", "x: took more than 256 MB"),
        (lambda: "a" * 2**23, "x: gave more than 4 MB"),
        (lambda: {}["a"], "x: KeyError: 'a'"),
        (lambda: "\ud800", None),
        (lambda: "as it is\n", None),
    ],
)
def test_every_way_a_limited_call_can_end(monkeypatch, function, words):
    monkeypatch.setattr(limited, "WALL_S", 1.0)
    if words is None:
        assert limited.call("x", function) == function()
        return
    with pytest.raises(ExportError, match=words):
        limited.call("x", function)


def test_this_process_keeps_no_limit_and_no_child():
    limited.call("x", lambda: "y")
    assert len(bytearray(2**29)) == 2**29
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
