"""The script that a runner gets, and what its output becomes: last line, exit status and file of logits."""

import json

import numpy as np
import pytest

from runtime_tests.device_runner import (
    Answer,
    Feed,
    Generate,
    Logits,
    Reset,
    RunnerFailure,
    Top,
    fitting,
    parse_answer,
    read_logits,
    script_text,
)

GOOD = {
    "runner": "pte",
    "runtime": "executorch 1.5.1",
    "threads": 2,
    "vocab_size": 4,
    "context_length": 8,
    "load_ns": 1,
    "feeds": [{"tokens": 1, "ns": 5}],
    "generated": [{"tokens": [1, 2], "ns": [3, 4]}],
    "top": [[[3, 1.5], [2, None]]],
    "logits_rows": 1,
    "logits_crc32": "ecbb4b55",
    "rss_before_load_bytes": 1,
    "peak_rss_bytes": 2,
}


def test_a_script_has_one_command_a_line_and_none_that_a_runner_would_refuse():
    commands = [Reset(), Feed((1, 2, 3)), Generate(4), Logits(), Top(5), Feed((0, 10**9))]
    assert script_text(commands) == "reset\nfeed 1 2 3\ngenerate 4\nlogits\ntop 5\nfeed 0 1000000000\n"
    for wrong in ([], [Feed(())], [Feed((-1,))], [Feed((1,)), Generate(0)], [Logits()]):
        with pytest.raises(ValueError, match="script line"):
            script_text(wrong)


def line(**changes) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def test_only_the_last_line_counts():
    answer = parse_answer(b"loading\n{}\n" + line() + b"\n", 0)
    assert isinstance(answer, Answer)
    assert answer.top == (((3, 1.5), (2, None)),)
    assert parse_answer(line() + b"\nbye\n", 0).stage == "protocol"


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"threads": 0},
        {"threads": "2"},
        {"threads": 2.0},
        {"threads": True},
        {"load_ns": -1},
        {"feeds": [{"tokens": 0, "ns": 5}]},
        {"feeds": [{"tokens": 1}]},
        {"generated": [{"tokens": [1, 2], "ns": [3]}]},
        {"top": [[[3]]]},
        {"logits_crc32": "xyz"},
        {"logits_crc32": "ECBB4B55"},
        {"runner": None},
        {"load_ns": 10**4000},
        {"peak_rss_bytes": 2**63},
        {"feeds": [{"tokens": 1, "ns": 0}]},
        {"generated": [{"tokens": [1], "ns": [10**400]}]},
        {"top": [[[3, float("nan")]]]},
        {"top": [[[3, float("inf")]]]},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_an_answer_that_is_not_the_documented_one_is_refused(changes):
    failure = parse_answer(line(**changes), 0)
    assert isinstance(failure, RunnerFailure)
    assert failure.stage == "protocol"
    assert next(iter(changes)) in failure.error


ASKED = [Feed((1,)), Generate(2), Top(2), Logits()]


@pytest.mark.hostile(
    "device", "folders, processors, locks and answers of odd words", "reach no path, command or markup; one line"
)
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"feeds": []}, "feeds"),
        ({"feeds": [{"tokens": 2, "ns": 5}]}, "feeds"),
        ({"feeds": [{"tokens": 1, "ns": 5}] * 2}, "feeds"),
        ({"generated": []}, "generated"),
        ({"generated": [{"tokens": [1], "ns": [3]}]}, "generated"),
        ({"generated": [{"tokens": [1, 4], "ns": [3, 4]}]}, "generated tokens"),
        ({"top": []}, "top"),
        ({"logits_rows": 0}, "logits"),
        ({"logits_rows": 2**62}, "logits"),
        ({"vocab_size": 8}, "vocab_size"),
    ],
)
def test_an_answer_about_something_else_is_told(changes, word):
    assert fitting(parse_answer(line(), 0), ASKED, 4)
    with pytest.raises(ValueError, match=f"its answer is not to this script: .*{word}.* differ"):
        fitting(parse_answer(line(**changes), 0), ASKED, 4)


def test_a_runners_own_words_are_one_line():
    words = json.dumps({"error": "\x1b[2Jall\nis well" + "x" * 1000, "stage": "load"}).encode()
    failure = parse_answer(words, 3)
    assert failure.error.isprintable()
    assert len(failure.error) <= 300


def test_every_key_is_needed():
    for key in GOOD:
        text = json.dumps({k: v for k, v in GOOD.items() if k != key}).encode()
        assert parse_answer(text, 0).stage == "protocol", key


@pytest.mark.parametrize(
    ("stdout", "returncode", "stage"),
    [
        (b'{"error": "no", "stage": "load"}\n', 3, "load"),
        (b'{"error": "no", "stage": "run"}\n', 4, "run"),
        (b'{"error": "no", "stage": "usage"}\n', 2, "usage"),
        (b'{"error": "no", "stage": "load"}\n', 4, "protocol"),
        (b'{"error": "no", "stage": "load"}\n', 0, "protocol"),
        (b'{"error": "no", "stage": "load", "more": 1}\n', 3, "protocol"),
        (line(), 1, "protocol"),
        (line(), 139, "crash"),
        (line(), -11, "crash"),
        (b"", 127, "protocol"),
        (b"", 0, "protocol"),
        (b"\xff\xfe\n", 0, "protocol"),
    ],
)
def test_the_exit_status_decides(stdout, returncode, stage):
    assert parse_answer(stdout, returncode).stage == stage


def test_a_crash_is_named_by_its_signal():
    assert parse_answer(b"", 139).error == "ended by SIGSEGV"
    assert parse_answer(b"", -9).error == "ended by SIGKILL"


def test_logits_cut_short_or_changed_on_the_way_are_seen(tmp_path):
    path = tmp_path / "logits"
    row = np.zeros(4, "<f4")
    row.tofile(path)
    answer = parse_answer(line(), 0)
    np.testing.assert_array_equal(read_logits(path, answer), row[None])
    for damage, message in ((row.tobytes()[:-1], "15 bytes"), (b"\1" + row.tobytes()[1:], "CRC-32")):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=message):
            read_logits(path, answer)
