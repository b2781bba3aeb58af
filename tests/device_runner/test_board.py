"""The runners in Python keep to docs/runner.md: the answers of the Python session, and every error in one line.

The one for Core ML runs over a stand-in for coremltools that executes packages and logs its inputs.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from export import manifest
from export.manifest import ROOT
from runtime_tests.checks.tokens import golden_of
from runtime_tests.device_runner import (
    Answer,
    Feed,
    Generate,
    Logits,
    Reset,
    Restore,
    Rewind,
    RunnerFailure,
    Save,
    Top,
    onnx_kv,
    parse_answer,
    read_logits,
    write_script,
)
from runtime_tests.sessions import base, board, greedy, saved
from runtime_tests.sessions.mlpackage import UNITS
from tests.support.artifacts import opened
from tests.support.scripts import BAD_LINES, EARLY, random_tokens, steps

CONTEXT = 600
"""Longer than the largest call of either runtime."""
FAKES = ROOT / "tests/support/fakes/coreml"
KINDS = {"onnx": ("onnx-cpu", "model.onnx"), "coreml": ("coreml", "model.mlpackage")}
SESSIONS = {"onnx": "onnx_kv", "coreml": "mlpackage"}


@pytest.fixture(scope="session")
def artifacts(tiny):
    """By runner: the tiny model's folder."""
    return {kind: tiny(target, context_length=CONTEXT) for kind, (target, _) in KINDS.items()}


@pytest.fixture(scope="session")
def runners(tmp_path_factory):
    """The folder that is pushed to a device."""
    folder = tmp_path_factory.mktemp("device")

    class Copying:
        def push(self, local, remote, *, timeout_s, only):
            (folder / remote).mkdir(parents=True)
            for name in only:
                shutil.copy(local / name, folder / remote)

    onnx_kv.push_sessions(Copying(), timeout_s=1)
    return folder / "runners"


@pytest.fixture
def start(runners, tmp_path):
    """Start a runner with these words, as a device does."""

    def run(kind, *words):
        there = [runners] if kind == "onnx" else [FAKES, runners, ROOT]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(map(str, there)),
            "PYTHONPYCACHEPREFIX": str(runners / "pycache"),
            "FAKE_COREML_CALLS": str(tmp_path / "calls"),
            **{name: value for name, value in os.environ.items() if name in ("FAKE_COREML_REFUSES", UNITS)},
        }
        command = [sys.executable, "-W", "ignore", "-m", f"sessions.{SESSIONS[kind]}", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False)
        assert b"Traceback" not in done.stderr
        return parse_answer(done.stdout, done.returncode)

    return run


@pytest.fixture
def run(start, artifacts, tmp_path):
    """Run commands on the tiny model, or another; the answer and its logits."""

    def call(kind, commands, model=None, threads=2):
        script, out = tmp_path / "script", tmp_path / "logits"
        write_script(commands, script)
        model = model or artifacts[kind] / KINDS[kind][1]
        answer = start(kind, model, script, "--threads", threads, "--logits", out)
        return answer, read_logits(out, answer) if isinstance(answer, Answer) else None

    return call


both = pytest.mark.parametrize("kind", KINDS)


# results


@both
def test_the_golden_tokens_and_the_python_sessions(run, artifacts, kind):
    answer = golden_of(manifest.read(artifacts[kind]))
    prompt = random_tokens(20)
    commands = [Feed(answer.prompt), Generate(len(answer.tokens)), Reset(), Feed(prompt), Generate(20)]
    result, _ = run(kind, commands)
    assert result.generated[0].tokens == answer.tokens
    assert list(result.generated[1].tokens) == greedy(opened(artifacts[kind]), prompt, 20)


@both
def test_logits_are_the_python_sessions(run, artifacts, kind):
    """The same runtime with the same calls: equal to the last bit. The prompt needs more than one call."""
    ids = random_tokens(590)
    _, rows = run(kind, [Feed(ids[:580]), Logits(), *steps(ids[580:])])
    session = opened(artifacts[kind])
    expected = np.stack([session.feed(ids[:580]), *(session.feed([token]) for token in ids[580:])])
    np.testing.assert_array_equal(rows, expected)
    assert min(np.abs(a - b).max() for a, b in pairwise(rows)) > 0.1


@both
def test_reset_forgets_everything(run, kind):
    again = [Reset(), Feed(random_tokens(50)), Logits(), Feed((7,)), Logits()]
    _, rows = run(kind, [*again, Feed(random_tokens(40, seed=4)), *again, Feed(random_tokens(50)), Logits()])
    np.testing.assert_array_equal(rows[:2], rows[2:4])
    assert np.abs(rows[4] - rows[0]).max() > 0.1  # without a reset the past shows


@both
def test_a_rewind_and_a_saved_session_bring_back_the_same_bits(run, artifacts, kind, tmp_path):
    ids, kept = random_tokens(60), Save("kept")
    asked = [Feed((7,)), Logits()]
    answer, rows = run(kind, [Feed(ids), kept, *asked, Feed(ids[::-1]), Rewind(60), *asked, Restore("kept"), *asked])
    np.testing.assert_array_equal(rows[1:], rows[:1].repeat(2, axis=0))
    assert answer.saved == ((tmp_path / "kept").stat().st_size,)
    np.testing.assert_array_equal(run(kind, [Restore("kept"), *asked])[1], rows[:1])  # in another process
    session = opened(artifacts[kind])
    saved.restore(session, tmp_path / "kept", bytes.fromhex(manifest.digest(artifacts[kind])))
    np.testing.assert_array_equal(session.feed([7]), rows[0])
    assert np.abs(run(kind, [Feed(ids[1:]), *asked])[1] - rows[0]).max() > 0.1


def test_what_cannot_be_rewound_or_restored_is_an_error_of_the_run(run, tmp_path):
    (tmp_path / "text").write_text("mine")
    for command, message in (
        (Rewind(4), "no rewinding to 4 tokens: the cache holds 3"),
        (Restore("nothing"), "nothing: no such file"),
        (Restore("text"), "text: no saved session"),
        (Save("text"), "text: is there and no saved session; choose another name"),
    ):
        assert run("onnx", [Feed((1, 2, 3)), command])[0] == RunnerFailure(stage="run", error=message)


def test_the_answer_describes_the_run(run):
    answer, rows = run("onnx", [Feed(random_tokens(9)), Generate(3), Logits(), Top(512), Feed((1,)), Generate(1)])
    assert answer.runner == "onnx"
    assert (answer.vocab_size, answer.context_length, answer.threads) == (512, CONTEXT, 2)
    assert [feed.tokens for feed in answer.feeds] == [9, 1]
    assert [len(part.tokens) for part in answer.generated] == [3, 1]
    order = np.argsort(-rows[0], kind="stable")
    assert [token for token, _ in answer.top[0]] == order.tolist()
    np.testing.assert_array_equal(np.float32([logit for _, logit in answer.top[0]]), rows[0][order])
    times = [answer.load_ns, *(feed.ns for feed in answer.feeds), *(ns for part in answer.generated for ns in part.ns)]
    assert min(times) > 0
    assert 0 < answer.rss_before_load_bytes < answer.peak_rss_bytes


def test_without_a_file_no_logits_are_written(start, artifacts, tmp_path):
    write_script([Feed((1, 2, 3))], tmp_path / "script")
    answer = start("onnx", artifacts["onnx"] / "model.onnx", tmp_path / "script")
    assert (answer.logits_rows, answer.logits_crc32) == (0, "00000000")
    assert answer.threads >= 1


# inputs of Core ML


def written_down(folder):
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize(("units", "meant"), [("cpu", "CPU"), ("cpu_ne", "CPU and NE"), ("all", "all"), ("", "")])
def test_a_package_is_compiled_once_and_runs_on_the_units_of_the_device(  # noqa: PLR0917
    start, runners, artifacts, monkeypatch, tmp_path, units, meant
):
    monkeypatch.setenv(UNITS, units) if units else monkeypatch.delenv(UNITS, raising=False)
    shutil.rmtree(runners / "compiled", ignore_errors=True)
    write_script([Feed((1, 2, 3))], tmp_path / "script")
    answers = [start("coreml", artifacts["coreml"] / "model.mlpackage", tmp_path / "script") for _ in range(2)]
    assert {answer.runtime.rpartition(", ")[2] for answer in answers} == {units or "cpu_gpu"}
    calls = written_down(tmp_path)
    assert len([call for call in calls if "compiled" in call]) == 1
    assert [call["loaded"] for call in calls if "loaded" in call] == [meant or "CPU and GPU"] * 2


def test_core_ml_is_called_as_the_contract_says(run, tmp_path):
    run("coreml", [Reset(), Feed(random_tokens(580)), Feed((1,)), Reset(), Feed((5, 6, 7))])
    calls = [call for call in written_down(tmp_path) if "ids" in call]
    steps = [(0, 512), (512, 68), (580, 1), (0, 3)]  # past and new: at most 512 tokens a call
    assert [call["ids"] for call in calls] == [["int32", [1, new]] for _, new in steps]
    assert [call["mask"] for call in calls] == [["float32", [1, 1, new, past + new]] for past, new in steps]
    assert [call["visible"] for call in calls] == [list(range(past + 1, past + new + 1)) for past, new in steps]
    assert {value for call in calls for value in call["values"]} == {0.0, -65504.0}
    assert {tuple(call["inputs"]) for call in calls} == {("causalMask", "inputIds")}
    first, *others = (call["state"] for call in calls)
    assert others == [first, first, first + 1], "a new state on reset, and only then"


@both
def test_a_model_whose_yaml_names_no_architecture(run, artifacts, tmp_path, kind):
    """configs/models/llama.yaml leaves it to the checkpoint: the manifest's own architecture counts."""
    folder = shutil.copytree(artifacts[kind], tmp_path / "llama")
    fields = json.loads((folder / "manifest.json").read_text())
    fields["plan"]["model"]["architecture"] = None
    (folder / "manifest.json").write_text(json.dumps(fields))
    answer, _ = run(kind, [Feed((1, 2, 3)), Logits()], folder / KINDS[kind][1])
    assert answer.vocab_size == 512


# refusals


def test_what_core_ml_says_of_a_package_that_it_refuses_reaches_the_user(run, runners, monkeypatch):
    shutil.rmtree(runners / "compiled", ignore_errors=True)
    monkeypatch.setenv("FAKE_COREML_REFUSES", "unsupported opset version 99")
    failure, _ = run("coreml", [Feed((1,))])
    assert failure.stage == "load"
    assert failure.error.endswith("model.mlpackage: Error compiling model: unsupported opset version 99")


def test_the_context_can_be_filled_and_not_passed(run):
    answer, rows = run("onnx", [Feed(random_tokens(CONTEXT - 1)), Generate(1), Logits()])
    assert len(answer.generated[0].tokens) == 1
    assert np.isfinite(rows).all()
    for commands in ([Feed(random_tokens(CONTEXT)), Generate(1)], [Feed(random_tokens(CONTEXT + 1))]):
        failure, _ = run("onnx", commands)
        assert failure.stage == "run"
        assert failure.error.endswith(f"the context holds {CONTEXT}")


@pytest.mark.parametrize(("commands", "message"), [([Feed((512,))], "token 512"), ([Feed((1,)), Top(513)], "top 513")])
def test_the_vocabulary_ends_where_it_ends(run, commands, message):
    failure, _ = run("onnx", commands)
    assert (failure.stage, failure.error) == ("run", f"{message}: the vocabulary has 512")


@both
def test_a_missing_model_does_not_load(run, kind, tmp_path):
    failure, _ = run(kind, [Feed((1,))], tmp_path / KINDS[kind][1])
    assert failure.stage == "load"
    assert str(tmp_path) in failure.error


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_truncated_model_does_not_load(run, artifacts, tmp_path, name, length):
    folder = shutil.copytree(artifacts["onnx"], tmp_path / "cut")
    (folder / name).write_bytes((folder / name).read_bytes()[:length])
    assert run("onnx", [Feed((1,))], folder / "model.onnx")[0].stage == "load"


@pytest.mark.parametrize("name", ["model.mlmodel", "weight.bin"])
def test_a_truncated_package_does_not_load(run, artifacts, tmp_path, name):
    folder = shutil.copytree(artifacts["coreml"], tmp_path / "cut")
    (path,) = folder.rglob(name)
    path.write_bytes(path.read_bytes()[:100])
    assert run("coreml", [Feed((1,))], folder / "model.mlpackage")[0].stage == "load"


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(line):
    script = f"feed 1\n{line}\nfeed 1\n".encode().decode("ascii", "replace")
    with pytest.raises(board.Failure, match="script line 2: ") as refused:
        board.parse(script, with_logits=True)
    assert refused.value.stage == board.USAGE
    assert "\n" not in str(refused.value)
    assert len(board.parse("feed 1\nfeed 1\n", with_logits=True)) == 2


@pytest.mark.parametrize("script", EARLY)
def test_logits_come_after_a_feed(script):
    with pytest.raises(board.Failure, match="there are no logits before a feed"):
        board.parse(script, with_logits=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model, script"),
        (["MODEL", "SCRIPT", "x"], "x"),
        (["MODEL", "SCRIPT", "--threads", "0"], "takes 1 to 1024, not '0'"),
        (["MODEL", "SCRIPT", "--threads", "2x"], "not '2x'"),
        (["MODEL", "SCRIPT", "--thr", "2"], "--thr"),
        (["MODEL", "SCRIPT", "--logits", ""], "needs a value"),
        (["MODEL", "no-such-script"], "cannot read the script no-such-script"),
        (["MODEL", "/"], "cannot read the script /"),
        (["MODEL", "SCRIPT"], "script line 2: logits need --logits FILE"),
        (["MODEL", "BAD"], "script line 1: no command: 'feed ?"),
        (["MODEL", "EMPTY"], "script line 1"),
    ],
)
def test_wrong_usage_is_refused(start, artifacts, tmp_path, words, message):
    write_script([Feed((1,)), Logits()], tmp_path / "SCRIPT")
    (tmp_path / "BAD").write_text("feed ١\n")
    (tmp_path / "EMPTY").touch()
    places = {"MODEL": artifacts["onnx"] / "model.onnx"}
    failure = start("onnx", *(places.get(word, word) for word in words))
    assert failure.stage == "usage"
    assert message in failure.error.replace("\N{REPLACEMENT CHARACTER}", "?")


def test_lines_end_in_a_newline_alone(start, artifacts, tmp_path):
    (tmp_path / "script").write_bytes(b"feed 1\r\n")
    assert start("onnx", artifacts["onnx"] / "model.onnx", tmp_path / "script").stage == "usage"


@pytest.mark.parametrize("place", ["no-such-folder/logits", pytest.param("/dev/full", marks=pytest.mark.linux), "."])
def test_logits_that_cannot_be_written_are_an_error(start, artifacts, tmp_path, place):
    write_script([Feed((1,)), Logits()], tmp_path / "script")
    failure = start("onnx", artifacts["onnx"] / "model.onnx", tmp_path / "script", "--logits", place)
    assert failure.stage == "run"
    assert failure.error.startswith(f"cannot write {place}: ")


def test_a_runtime_that_fails_in_the_middle_is_an_error_in_one_line(monkeypatch, capsys, tmp_path):
    class Failing(base.Session):
        def step(self, tokens, position):
            raise RuntimeError("kernel\nfailed")

    (tmp_path / "script").write_text("feed 1\n")
    (tmp_path / "manifest.json").write_text('{"contract": {}, "architecture": {"vocab_size": 8}}')
    monkeypatch.setattr(sys, "argv", ["runner", str(tmp_path / "model"), str(tmp_path / "script")])
    status = board.main("fake", "fake 1", lambda model, contract, threads: Failing(8, 8, "last", 8))
    answer = parse_answer(capsys.readouterr().out.encode(), status)
    assert answer == RunnerFailure(stage="run", error="RuntimeError: kernel failed")


# imports


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("base", set()),
        ("board", set()),
        ("footprint", set()),
        ("saved", set()),
        ("onnx_kv", {"onnxruntime"}),
        ("mlpackage", {"coremltools"}),
    ],
)
def test_a_board_needs_nothing_but_its_runtime(name, runtime):
    """Parts that only a type checker or the host uses are left out."""
    allowed = sys.stdlib_module_names | {"numpy"} | runtime
    for node in executed((onnx_kv.SESSIONS / f"{name}.py").read_text()):
        if isinstance(node, ast.Import):
            assert {name.name.partition(".")[0] for name in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == 1 and node.module in ("base", "board", "footprint", "saved")
            assert inside or node.module.partition(".")[0] in allowed


HOST_ONLY = ("Evaluated", "cache_here", "open_session", "runtime_calls")


def executed(source):
    """Every node of a module that a device may execute."""
    for node in ast.parse(source).body:
        types_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not types_only and getattr(node, "name", "") not in HOST_ONLY:
            yield from ast.walk(node)
