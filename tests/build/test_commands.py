"""Sub-commands: help lists them, and arguments that begin with none belong to the default one."""

import sys

import pytest
import typer

from export.build.command import run, with_default
from runtime_tests.__main__ import app as runtime_tests

calls = []
app = typer.Typer(cls=with_default("make"))


@app.command("make")
def make(name: str, size: int = 0):
    calls.append(("make", name, size))


@app.command("show")
def show(name: str):
    calls.append(("show", name))


@pytest.mark.parametrize(
    ("arguments", "called"),
    [
        (["thing"], ("make", "thing", 0)),
        (["--size", "3", "thing"], ("make", "thing", 3)),
        (["make", "thing"], ("make", "thing", 0)),
        (["make", "show"], ("make", "show", 0)),
        (["show", "thing"], ("show", "thing")),
    ],
)
def test_arguments_without_a_sub_command_are_the_defaults(monkeypatch, arguments, called):
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    calls.clear()
    assert run(app) == 0
    assert calls == [called]


def test_no_arguments_are_the_defaults_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program"])
    assert run(app) == 2
    assert "Missing argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ("validate", "chat")),
        (["validate", "--help"], ("-tasks", "-device")),
        (["chat", "--help"], ("-temperature",)),
    ],
)
def test_help_of_runtime_tests(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["runtime_tests", *arguments])
    assert run(runtime_tests) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)
