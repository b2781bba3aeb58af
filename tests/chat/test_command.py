"""`python -m runtime_tests chat` through a pipe: what it answers, obeys and refuses."""

import io
import json
import os
import re
import sys

import pytest

from export import manifest
from export.build.command import run as run_app
from runtime_tests.__main__ import app
from runtime_tests.chat import command
from runtime_tests.chat.conversation import PrefixCache
from runtime_tests.jobs import worker
from tests.support.artifacts import reseal, set_fault
from tests.support.conversations import CONTEXT, MESSAGES, ask, opened
from tests.support.reliability import CONVERSATION


@pytest.fixture
def chat(monkeypatch, capsys):
    """Runs the command with standard input; exit code, stdout, stderr."""

    def run(folder, *arguments, typed=b""):
        monkeypatch.setattr(sys, "argv", ["runtime_tests", "chat", str(folder), *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(command.environment, "threads", lambda: 1)
        code = run_app(app)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    return run


def test_piped_messages_are_answered_one_per_line(chat, built, talk):
    code, out, err = chat(built, "--max-new-tokens", "8", typed=b"hello\r\n\nand then?")
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
    first, again, other = (chat(built, *options, seed, typed=b"hello\n")[1] for seed in ("1", "1", "2"))
    assert first == again != other


def test_reset_system_and_exit_are_obeyed_and_unknown_commands_named(chat, built, talk):
    typed = b"hello\n/reset\nhello\n/system Be brief.\nwhy\n/exit\nnever asked\n"
    code, out, err = chat(built, "--max-new-tokens", "8", typed=typed)
    conversation = talk(max_new_tokens=8)
    expected = ask(conversation, "hello").text + "\n"
    conversation.system = "Be brief."
    expected += expected + ask(conversation, "why").text + "\n"
    assert (code, out) == (0, expected)
    assert "the conversation begins anew" in err
    assert "system: Be brief." in err
    assert err.count("prefill") == 3
    code, out, err = chat(built, typed=b"/sytem x\n/help\n")
    assert (code, out) == (1, "")
    assert "unknown command /sytem" in err
    assert "/system TEXT" in err


def test_what_a_runtime_tells_while_it_loads_is_shown_where_it_does_not(artifact, capfd, monkeypatch):
    def noisy(*given):
        os.write(2, b"[cpuinfo_utils.cpp:71] Reading file\n")
        return session(*given)

    session = worker.opened
    monkeypatch.setattr(worker, "opened", noisy)
    monkeypatch.setattr(sys, "argv", ["runtime_tests", "chat", str(artifact)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert run_app(app) == 0
    assert "cpuinfo" not in capfd.readouterr().err
    set_fault(artifact, "does not load")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert run_app(app) == 1
    noise, error = capfd.readouterr().err.splitlines()
    assert noise == "[cpuinfo_utils.cpp:71] Reading file"
    assert error == f"error: {artifact}: does not load: RuntimeError: the file is of a newer version"


def test_a_system_message_given_with_the_command(chat, built, talk):
    _, out, _ = chat(built, "--system", "Be brief.", "--max-new-tokens", "8", typed=b"hello\n")
    conversation = talk(max_new_tokens=8)
    assert out != ask(conversation, "hello").text + "\n"
    conversation.reset()
    conversation.system = "Be brief."
    assert out == ask(conversation, "hello").text + "\n"


def test_a_full_context_is_said_and_reset_goes_on(chat, short):
    code, out, err = chat(short, typed=b"hello\nmore\n/reset\nhello\n")
    assert code == 1  # one message has no answer
    assert len(out.splitlines()) == 2
    assert err.count("context 64/64 · the context is full: /reset begins anew") == 2
    full = "error: left out: the context is full: this conversation has 73 tokens, the artifact's context 64"
    assert [line for line in err.splitlines() if line.startswith("error")] == [f"{full}; /reset begins anew"]


def test_the_evaluator_is_named_and_not_timed(chat, artifact):
    set_fault(artifact, "reference evaluator")
    code, _, err = chat(artifact, "--max-new-tokens", "2", typed=b"hello\n")
    assert code == 0
    assert "the reference evaluator computes the same" in err
    assert "speed not measured: reference evaluator · context" in err
    assert "tok/s" not in err


END = "{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + END
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + END
)
AT_MOST_20 = "{% for m in messages %}{% if m.content | length > 20 %}{{ raise_exception('too long') }}{% endif %}" + END
NOTHING = "{% if messages[-1].content != 'nothing' %}{% for m in messages %}" + END + "{% endif %}"
TOLD = "error: left out: this message: chat template: TemplateError: "
TOLD_SYSTEM = "error: left out: this system message: chat template: TemplateError: "
NOT_FINITE = "error: left out: the artifact computes NaN or infinity; validate it with `python -m runtime_tests`"


@CONVERSATION
@pytest.mark.parametrize(
    ("template", "fault", "refused", "line"),
    [
        (NO_SYSTEM, "", "/system be brief", f"{TOLD_SYSTEM}no system role"),
        (ALTERNATING, "", "/system be brief", f"{TOLD_SYSTEM}roles must alternate"),
        (AT_MOST_20, "", "x" * 21, f"{TOLD}too long"),
        (AT_MOST_20, "", f"/system {'x' * 21}", f"{TOLD_SYSTEM}too long"),
        ("{{ (10 ** 10 if messages[-1].content == 'x' else 1) * '<|user|>a' }}", "", "x",
         "error: left out: this message: chat template: took more than 256 MB"),
        ("{{ raise_exception('\x1b[31mred') if messages[-1].content == 'x' else '<|user|>a' }}", "", "x",
         rf"{TOLD}\x1b[31mred"),
        ("{{ '\\ud800' if messages[-1].content == 'x' else '<|user|>a' }}", "", "x",
         r"error: left out: this message: chat template: writes half a character ('\ud800'), which no tokenizer takes"),
        (NOTHING, "", "nothing", "error: left out: this message: the chat template writes nothing for it"),
        (None, "", "x" * 300, "error: left out: this message is too long: 303 tokens with the"),
        (None, "", f"/system {'x' * 300}", "error: left out: this system message is too long: 310 tokens with the"),
        (None, "", "/sytem x", "error: left out: unknown command /sytem"),
        (None, "", "x" * 20 + "\udcff", f"error: left out: a line that is not UTF-8 (after '{'x' * 20}')"),
        (None, "nan", "x" * 84, NOT_FINITE),
        (None, "nan", "x" * 81, NOT_FINITE),  # in the middle of the answer
        (None, "raises", "x" * 70, "error: left out: the artifact's runtime: kernel not implemented"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_and_the_rest_is_answered(chat, artifact, template, fault, refused, line):
    set_fault(artifact, fault)
    if template:
        set_template(artifact, template)
    options = ("--max-new-tokens", "4")
    _, expected, _ = chat(artifact, *options, typed=b"hello\nand then?\n")
    code, out, err = chat(artifact, *options, typed=f"hello\n{refused}\nand then?\n".encode("utf-8", "surrogateescape"))
    answers = out.splitlines()
    assert [answers[0], answers[-1]] == expected.splitlines()
    assert code == 1
    errors = [said for said in err.splitlines() if said.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith(line)


@CONVERSATION
def test_a_system_message_that_the_template_refuses_is_refused_at_once(chat, artifact):
    set_template(artifact, NO_SYSTEM)
    code, out, err = chat(artifact, "--system", "be brief", typed=b"hello\n")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "error: this system message: chat template: TemplateError: no system role"


BOMB = "{{ messages[0].content * (10 ** 10 if messages[0].content == 'hello' else 1) }}"
"""For this message only: the conversation on which a checkpoint's template is tried is written well."""


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
            "model.safetensors: 1 bytes, manifest.json says",
        ),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("x"),
            "chat_template.jinja: 1 bytes, manifest.json says",
        ),
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
    code, out, err = chat(artifact, typed=b"hello\n")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (1, "", 1)
    assert re.search(line, errors[0])


def set_template(folder, text):
    (folder / "chat_template.jinja").write_text(text)
    reseal(folder)


def test_an_artifact_without_a_chat_template(chat, artifact):
    fields = json.loads((artifact / manifest.FILE).read_text())
    fields["tokenizer"]["chat_example"] = None
    (artifact / manifest.FILE).write_text(json.dumps(fields))
    code, out, err = chat(artifact, typed=b"hello\n")
    assert (code, out) == (1, "")
    assert "its tokenizer has no chat template; build it from an instruct model" in err


def test_options_that_contradict_and_input_that_is_no_text(chat, built):
    code, _, err = chat(built, "--top-p", "0.9", typed=b"hello\n")
    assert code == 2
    assert "give a --temperature above 0" in err
    code, out, err = chat(built, typed=b"hell\xff\n")
    assert (code, out) == (1, "")
    assert "error: left out: a line that is not UTF-8 (after 'hell')" in err


@pytest.mark.parametrize(("target", "module"), [("onnx-cpu", "onnxruntime"), ("executorch-xnnpack", "executorch"),
                                                ("coreml", "coremltools")])  # fmt: skip
def test_every_format_talks_and_keeps_its_cache(chat, talk, tiny, target, module):
    pytest.importorskip(module, reason=f"{module} is not installed")
    folder = tiny(target)
    typed = "".join(f"{message}\n" for message in MESSAGES[:2])
    code, out, _ = chat(folder, "--max-new-tokens", "6", typed=typed.encode())
    assert code == 0
    conversation = talk(folder=folder, max_new_tokens=6)
    answers = [ask(conversation, message) for message in MESSAGES[:2]]
    assert out == "".join(answer.text + "\n" for answer in answers)
    assert answers[1].prefilled == len(MESSAGES[1]) + 5
    conversation.cache = PrefixCache(opened(folder), manifest.digest(folder))
    conversation.turns = conversation.turns[:2]
    fresh = ask(conversation, MESSAGES[1])
    assert fresh.prefilled > answers[1].prefilled
    assert fresh.text == answers[1].text


# ── saved conversations ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_saved_conversation_goes_on_in_another_process_as_if_it_had_not_ended(chat, tiny, tmp_path):
    folder, kept = tiny("onnx-cpu"), tmp_path / "kept"
    options, first, second = ("--max-new-tokens", "8"), b"/system Be brief.\nhello\nand then?\n", b"why\n"
    code, whole, figures = chat(folder, *options, typed=first + second)
    assert code == 0
    code, before, err = chat(folder, *options, typed=first + f"/save {kept}\n".encode())
    assert code == 0
    assert re.search(r"saved: 4 messages, \d+ tokens, 0.0 MB", err)
    code, after, err = chat(folder, *options, typed=f"/load {kept}\n".encode() + second)
    assert (code, before + after) == (0, whole)
    assert "loaded: 4 messages, " in err
    prefilled = re.compile(r"prefill (\d+) tokens")
    assert prefilled.findall(err) == prefilled.findall(figures)[2:]  # the past is not fed again


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (b"/save\n", "/save needs the name of a file"),
        (b"/load   \n", "/load needs the name of a file"),
        (b"/load no-such\n", "no-such: no such file"),
        (b"/load ~nobody/x\n", "/load: '~nobody/x' is no name for a file"),
        (b"/save a\0b\n", "/save: 'a\\x00b' is no name for a file"),
        (b"/save no-folder/kept\n", "no-folder/kept: cannot be written: No such file or directory"),
        (b"/load manifest.json\n", "manifest.json: no saved session"),
        (b"/save manifest.json\n", "manifest.json: is there and no saved session; choose another name"),
    ],
)
def test_a_file_that_cannot_be_saved_or_loaded_is_one_line_and_the_chat_goes_on(
    chat, tiny, monkeypatch, typed, message
):
    monkeypatch.chdir(tiny("onnx-cpu"))
    code, out, err = chat(tiny("onnx-cpu"), "--max-new-tokens", "2", typed=typed + b"hello\n")
    assert code == 1
    assert out.strip()
    assert f"error: left out: {message}" in err


def test_a_runtime_that_keeps_its_cache_is_named(chat, built):
    code, _, err = chat(built, typed=b"/save kept\n")
    assert (code, err.count("left out: this runtime does not give its KV cache")) == (1, 1)
