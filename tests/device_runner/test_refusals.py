"""Refusals of the C++ runner: scripts, arguments, files and models, each in one line."""

import struct

import numpy as np
import pytest
import torch

from devices import visible
from export.formats.pte import file
from runtime_tests.device_runner import (
    Answer,
    Feed,
    Generate,
    Logits,
    Restore,
    Rewind,
    RunnerFailure,
    Save,
    Top,
    write_script,
)
from tests.device_runner.conftest import started
from tests.sessions.test_saved import BAD
from tests.support.scripts import BAD_LINES, EARLY, PROMPT, random_tokens


def test_the_context_can_be_filled_and_not_passed(run):
    ids = random_tokens(250)
    answer, rows = run([Feed(ids), Generate(6), Logits()])
    assert len(answer.generated[0].tokens) == 6
    assert np.isfinite(rows).all()
    for commands in ([Feed(ids), Generate(7)], [Feed(ids), Feed(ids[:7])], [Feed(ids + ids)]):
        failure, _ = run(commands)
        assert failure.stage == "run"
        assert "the context holds 256" in failure.error


@pytest.mark.parametrize(("commands", "message"), [([Feed((512,))], "token 512"), ([Feed((1,)), Top(513)], "top 513")])
def test_the_vocabulary_ends_where_it_ends(run, commands, message):
    failure, _ = run(commands)
    assert failure.stage == "run"
    assert failure.error == f"{message}: the vocabulary has 512"
    assert isinstance(run([Feed((511,)), Top(512)])[0], Answer)


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(run, line):
    """The runners in Python refuse the same lines (`test_board.py`); the good line before and after it is accepted."""
    failure, _ = run(f"feed 1\n{line}\nfeed 1\n")
    assert failure.stage == "usage"
    assert failure.error.startswith("script line 2: ")
    assert isinstance(run("feed 1\nfeed 1\n")[0], Answer)


@pytest.mark.parametrize("script", EARLY)
def test_logits_come_after_a_feed(run, script):
    failure, _ = run(script)
    assert failure.stage == "usage"
    assert failure.error.endswith("there are no logits before a feed")


def test_no_rewind_to_what_was_never_fed(run):
    failure, _ = run([Feed((1, 2)), Rewind(3)])
    assert failure == RunnerFailure(stage="run", error="no rewinding to 3 tokens: the cache holds 2")
    assert isinstance(run([Feed((1, 2)), Rewind(2)])[0], Answer)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("empty", "no saved session"),
        ("text", "no saved session"),
        ("another version", "a saved session of version 2, this program reads 1; save it again"),
        ("another artifact", "saved with another artifact"),
        ("very long", "4294967295 tokens, the KV cache has room for 256"),
        ("a longer note", "damaged: "),
        ("cut off", "damaged: "),
        ("a flipped bit", "damaged: its CRC-32 is another; copy or save it again"),
    ],
)
def test_a_bad_saved_session_is_one_line(run, tmp_path, harm, message):
    path = tmp_path / "kept"
    run([Feed(random_tokens(9)), Save(path.name)])
    path.write_bytes(BAD[harm][0](path.read_bytes()))
    failure, _ = run([Restore(path.name)])
    assert failure.stage == "run"
    assert failure.error.startswith(f"{path.name}: {message}")
    (tmp_path / "notes.txt").write_text("mine")
    failure, _ = run([Save("notes.txt")])
    assert failure.error == "notes.txt: is there and no saved session; choose another name"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept", "logits", "notes.txt", "script"]


def test_an_empty_script_is_refused(run):
    assert run("")[0].stage == "usage"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "0 file(s)"),
        (["MODEL"], "1 file(s)"),
        (["MODEL", "SCRIPT", "x"], "3 file(s)"),
        (["MODEL", "SCRIPT", "--threads"], "--threads needs a value"),
        (["MODEL", "SCRIPT", "--threads", "0"], "--threads takes 1 to 1024, not '0'"),
        (["MODEL", "SCRIPT", "--threads", "2x"], "not '2x'"),
        (["MODEL", "SCRIPT", "--logits", ""], "--logits needs a value"),
        (["MODEL", "SCRIPT", "--speed"], "unknown option --speed"),
        (["MODEL", "no-such-script"], "cannot read the script no-such-script"),
        (["MODEL", "/"], "cannot read the script /"),
        (["MODEL", "SCRIPT"], "asks for logits"),
    ],
)
def test_wrong_arguments_are_refused(bundle, artifacts, tmp_path, words, message):
    write_script([Feed(PROMPT), Logits()], tmp_path / "script")
    files = {"MODEL": artifacts["fp32"] / "model.pte", "SCRIPT": tmp_path / "script"}
    failure = started(bundle, *(files.get(word, word) for word in words))
    assert failure.stage == "usage"
    assert message in failure.error


@pytest.mark.parametrize("place", ["no-such-folder/logits", pytest.param("/dev/full", marks=pytest.mark.linux), "."])
def test_logits_that_cannot_be_written_are_an_error(bundle, artifacts, tmp_path, place):
    write_script([Feed(PROMPT), Logits()], tmp_path / "script")
    failure = started(bundle, artifacts["fp32"] / "model.pte", tmp_path / "script", "--logits", place)
    assert failure.stage == "run"
    assert failure.error.startswith(f"cannot write {place}: ")


@pytest.mark.parametrize("length", [0, 1, 7, 31, 32, 100, 5_000, 20_000, 200_000, -1])
def test_a_truncated_model_is_refused(run, artifacts, tmp_path, length):
    whole = (artifacts["int4-g32"] / "model.pte").read_bytes()
    (tmp_path / "cut.pte").write_bytes(whole[:length])
    failure, _ = run([Feed(PROMPT)], tmp_path / "cut.pte")
    assert failure.stage == "load"
    assert "cut.pte: ExecuTorch error" in failure.error
    (tmp_path / "cut.pte").write_bytes(whole)
    assert isinstance(run([Feed(PROMPT)], tmp_path / "cut.pte")[0], Answer)


@pytest.mark.parametrize("field", ["program size", "segment offset"])
@pytest.mark.parametrize("value", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_sizes_is_refused(run, artifacts, tmp_path, field, value):
    data = bytearray((artifacts["int4-g32"] / "model.pte").read_bytes())
    assert data[8:12] == b"eh00"
    struct.pack_into("<Q", data, {"program size": 16, "segment offset": 24}[field], value)
    (tmp_path / "model.pte").write_bytes(data)
    failure, _ = run([Feed(PROMPT)], tmp_path / "model.pte")
    assert failure.stage == "load"


@pytest.mark.parametrize("claimed", [-1, 0, 4096, 2**62])
def test_a_cache_of_another_size_than_the_program_uses_is_refused(run, artifacts, tmp_path, claimed):
    path = artifacts["int4-g32"] / "model.pte"
    (_, real) = file.open_pte(path).program.execution_plan[0].non_const_buffer_sizes
    data = path.read_bytes()
    assert data.count(struct.pack("<q", real)) == 1
    for size, outcome in ((claimed, RunnerFailure), (real, Answer)):
        (tmp_path / "model.pte").write_bytes(data.replace(struct.pack("<q", real), struct.pack("<q", size)))
        answer, _ = run([Feed(PROMPT)], tmp_path / "model.pte")
        assert isinstance(answer, outcome)
        assert outcome is Answer or answer.stage == "load"


def test_other_files_are_no_model(run, tmp_path):
    (tmp_path / "text.pte").write_text("not a program\n" * 1000)
    for path in (tmp_path / "missing.pte", tmp_path, tmp_path / "text.pte"):
        failure, _ = run([Feed(PROMPT)], path)
        assert failure.stage == "load"


def test_another_program_is_no_language_model(run, tmp_path):
    from executorch.exir import to_edge

    class Add(torch.nn.Module):
        def forward(self, x):
            return x + x

    program = to_edge(torch.export.export(Add(), (torch.ones(2),))).to_executorch()
    (tmp_path / "add.pte").write_bytes(program.buffer)
    failure, _ = run([Feed(PROMPT)], tmp_path / "add.pte")
    assert failure.stage == "load"
    assert "get_max_context_len" in failure.error


@pytest.mark.parametrize(
    "name", ['quote".pte', "line\nbreak.pte", "back\\slash.pte", "schön.pte", b"raw\xff.pte", "\x01"]
)
def test_an_error_is_json_whatever_the_file_is_called(bundle, tmp_path, name):
    (tmp_path / "script").write_text("feed 1\n")
    failure = started(bundle, name, tmp_path / "script")
    assert failure.stage == "load"
    shown = visible(name) if isinstance(name, str) else "raw?.pte"
    assert shown in failure.error
