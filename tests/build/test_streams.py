"""Every command with a standard stream that is closed, full or not read: never a traceback."""

import importlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from export import __main__ as export
from export import manifest
from export.build.command import describe, run
from runtime_tests import __main__ as runtime_tests
from tests.support import shape
from tests.support.reliability import CONVERSATION

pytestmark = CONVERSATION

CHILDREN = {
    "export.host.processes", "export.toolbox.model_checks", "runtime_tests.jobs.worker", "runtime_tests.bench.forms",
    "runtime_tests.bench.exports", "runtime_tests.bench.runners.llamacpp", "runtime_tests.sessions.mlpackage",
    "runtime_tests.sessions.onnx_kv",
}  # fmt: skip
"""Started by other programs of ours, which read what they say."""
COMMANDS = sorted(
    name
    for name, path in shape.modules().items()
    if 'if __name__ == "__main__"' in path.read_text() and not name.startswith("devices") and name not in CHILDREN
)


def ended(app, arguments, streams):
    """The exit code of a command whose three streams are closed, or its outputs on a full disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        for name in ("stdin", "stdout", "stderr"):
            full = streams == "full" and name != "stdin"
            patch.setattr(sys, name, Path("/dev/full").open("w") if full else None)  # noqa: SIM115 – run flushes it
        return run(app)


def test_all_commands_are_found():
    assert {"export.__main__", "runtime_tests.__main__", "runtime_tests.bench.__main__"} < set(COMMANDS)
    assert len(COMMANDS) >= 14


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("streams", "argument", "code"),
    [
        ("closed", "--help", 0),
        ("closed", "--no-such-option", 2),
        pytest.param("full", "--help", 1, marks=pytest.mark.linux),
        pytest.param("full", "--no-such-option", 2, marks=pytest.mark.linux),
    ],
)
def test_every_command_ends_in_the_frame(command, streams, argument, code):
    assert ended(importlib.import_module(command).app, [argument], streams) == code


@pytest.mark.parametrize(("streams", "code"), [("closed", 0), pytest.param("full", 1, marks=pytest.mark.linux)])
@pytest.mark.parametrize("arguments", [("inspect",), ("inspect", "--json"), ("diff",), ("diff", "--json")])
def test_the_toolbox_ends_in_the_frame(built, arguments, streams, code):
    folders = [str(built)] * (2 if arguments[0] == "diff" else 1)
    assert ended(export.app, [*arguments, *folders], streams) == code


@pytest.mark.parametrize(("streams", "code"), [("closed", 0), pytest.param("full", 1, marks=pytest.mark.linux)])
def test_a_chat_ends_in_the_frame(built, streams, code, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ended(runtime_tests.app, ["chat", str(built)], streams) == code


@pytest.mark.parametrize("arguments", [["verify", "ck-\udcff"], ["tiny", "int4-g32", "onnx-cpu", "--out", "o\udcff"]])
def test_an_argument_that_is_not_utf8_is_a_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    assert run(export.app) == 1
    line = f"error: {arguments[-1]!r}: not in the encoding utf-8; give it in UTF-8, a path renamed\n"
    assert capsys.readouterr().err.endswith(line)


def test_an_output_without_our_characters_gets_their_numbers(built, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["export", "diff", str(built), str(built)])
    assert run(export.app) == 0
    assert rb"MB \u2192 " in written.getvalue()


def in_shell(line, **options):
    return subprocess.run(
        ["bash", "-c", line], cwd=manifest.ROOT, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("0<&-", 0, ""), ("1>&-", 0, ""), ("2>&-", 0, ""), ("0<&- 1>&- 2>&-", 0, ""), ("</dev/null", 0, ""),
        pytest.param(">/dev/full", 1, "error: writing: No space left on device\n", marks=pytest.mark.linux),
        pytest.param("2>/dev/full", 0, "", marks=pytest.mark.linux),
        ("| head -c0; exit ${PIPESTATUS[0]}", None, ""),
    ],
)  # fmt: skip
def test_streams_of_a_shell(redirected, code, said):
    done = in_shell(f'"$PYTHON" -m export --help {redirected}')
    assert done.stderr == said
    assert done.returncode in ((0, 1) if code is None else (code,))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "writing: No space left on device"),
        (OSError(37, "No locks available"), "No locks available (the system names no file: ENOLCK)"),
        (OSError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (OSError("cannot be\nread"), "cannot be read"),
    ],
)
def test_a_system_error_says_writing_only_of_writing(error, line):
    assert describe(error) == line
