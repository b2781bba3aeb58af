"""The device runner: what the Python session answers, in another process without torch; every error in one line."""

import json
import re
import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from export import manifest
from export.backends.pte import readback
from export.errors import ExportError
from export.pipeline import export
from export.plan import load_plan
from runtime_tests.generate import greedy
from runtime_tests.runner import (
    Answer,
    Feed,
    Generate,
    Logits,
    Reset,
    RunnerFailure,
    Top,
    build,
    parse_answer,
    parse_script,
    read_logits,
    script_text,
    sdk,
    write_script,
)
from runtime_tests.session import open_session

from .scripts import BAD_LINES, EARLY

QEMU = "qemu-aarch64-static"
PROMPT = (5, 17, 301, 44, 8, 2, 399, 120)


def built(abi):
    try:
        return build.build(abi)
    except sdk.UnavailableError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def bundle():
    return built(build.host_abi())


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """The tiny model quantized, and in float32, where the same arithmetic gives the same numbers."""
    folders = {quant: tmp_path_factory.mktemp("runner") / quant for quant in ("int4-g32", "fp32")}
    for quant, folder in folders.items():
        export(load_plan("tiny", quant, "executorch-xnnpack"), None, folder)
    return folders


@pytest.fixture
def run(bundle, artifacts, tmp_path):
    """Run commands, or the text of a script, on a model; gives the answer and its logits."""

    def call(commands, model="fp32", *, threads=2, prefix=(), start=None, folder=None):
        script, out = tmp_path / "script", tmp_path / "logits"
        if isinstance(commands, str):
            script.write_text(commands)
        else:
            write_script(commands, script)
        path = artifacts[model] / "model.pte" if model in artifacts else model
        folder, start = folder or bundle.path, start or bundle.start
        words = [*prefix, *start, path, script, "--threads", str(threads), "--logits", out]
        answer = execute(words, folder)
        return answer, read_logits(out, answer) if isinstance(answer, Answer) else None

    return call


def execute(words, folder):
    """Nothing of our environment reaches the runner: it must find its libraries by itself."""
    done = subprocess.run(words, cwd=folder, capture_output=True, timeout=120, env={"PATH": "/usr/bin"}, check=False)
    return parse_answer(done.stdout, done.returncode)


def started(bundle, *words):
    return execute([bundle.path / "bin" / "runner", *words], bundle.path)


def opened(folder):
    return open_session(folder, manifest.read(folder), threads=2)


def stepped(folder, prompt, tokens) -> np.ndarray:
    session = opened(folder)
    rows = [session.feed(prompt), *(session.feed([token]) for token in tokens)]
    session.close()
    return np.stack(rows)


def steps(tokens):
    return [part for token in tokens for part in (Feed((token,)), Logits())]


def random_tokens(count, seed=3):
    return tuple(torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


# what it computes


@pytest.mark.parametrize("model", ["int4-g32", "fp32"])
def test_greedy_tokens_are_the_python_sessions(run, artifacts, model):
    expected = greedy(opened(artifacts[model]), PROMPT, 60)
    answer, _ = run([Feed(PROMPT), Generate(60)], model)
    assert list(answer.generated[0].tokens) == expected
    assert len(set(expected)) > 1
    other, _ = run([Feed(PROMPT[::-1]), Generate(60)], model)
    assert list(other.generated[0].tokens) != expected


def test_logits_are_the_python_sessions(run, artifacts):
    """Both call the same XNNPACK; attention differs in the order of its sums: measured 1.6e-5, of logits up to 13."""
    ids = random_tokens(120)
    _, rows = run([Feed(ids[:70]), Logits(), *steps(ids[70:])])
    reference = stepped(artifacts["fp32"], ids[:70], ids[70:])
    assert np.abs(rows - reference).max() < 1e-4
    assert np.abs(rows[1:] - reference[:-1]).max() > 0.1  # another position


def test_a_lone_token_gives_the_python_sessions_logits(run, artifacts):
    """It attends to itself alone, so the kernels have no order of sums to differ in, and int8 rounding no edge to cross
    (docs/decisions.md): the quantized model is equal to the last bits as well."""
    tokens = random_tokens(64)
    _, rows = run([part for token in tokens for part in (Reset(), Feed((token,)), Logits())], "int4-g32")
    session = opened(artifacts["int4-g32"])
    expected = []
    for token in tokens:
        session.reset()
        expected.append(session.feed([token]))
    assert np.abs(rows - np.stack(expected)).max() < 1e-5
    assert min(np.abs(a - b).max() for a, b in pairwise(rows)) > 0.1


@pytest.mark.parametrize("model", ["int4-g32", "fp32"])
def test_reset_forgets_everything(run, model):
    ids = random_tokens(100)
    again = [Reset(), Feed(ids[:50]), Logits(), *steps(ids[50:60])]
    _, rows = run([*again, Feed(ids[60:]), *again, Feed(ids[:50]), Logits()], model)
    np.testing.assert_array_equal(rows[:11], rows[11:22])
    assert np.abs(rows[22] - rows[0]).max() > 0.1  # without a reset the past shows


def test_a_feed_in_pieces_is_the_feed_at_once(run):
    ids = random_tokens(130)
    _, rows = run([Feed(ids), Logits(), Reset(), *(Feed((token,)) for token in ids), Logits()])
    assert np.abs(rows[0] - rows[1]).max() < 1e-4
    _, other = run([Feed(ids[1:]), Logits()])
    assert np.abs(other[0] - rows[0]).max() > 0.1


@pytest.mark.parametrize("model", ["int4-g32", "fp32"])
def test_threads_change_nothing_but_time(run, model):
    commands = [Feed(random_tokens(90)), Logits(), Generate(20), Logits()]
    answers = [run(commands, model, threads=threads) for threads in (1, 2, 3)]
    assert [answer.threads for answer, _ in answers] == [1, 2, 3]
    assert len({answer.generated[0].tokens for answer, _ in answers}) == 1
    assert len({answer.logits_crc32 for answer, _ in answers}) == 1
    assert run([Feed(random_tokens(91)), Logits()], model)[0].logits_crc32 != answers[0][0].logits_crc32


def test_top_is_the_order_of_the_logits(run):
    answer, rows = run([Feed(PROMPT), Top(512), Logits()], "int4-g32")
    order = np.argsort(-rows[0], kind="stable")
    assert [token for token, _ in answer.top[0]] == order.tolist()
    np.testing.assert_array_equal(np.float32([logit for _, logit in answer.top[0]]), rows[0][order])


def test_the_answer_describes_the_run(run, artifacts):
    described = manifest.read(artifacts["int4-g32"])
    answer, rows = run([Feed(PROMPT), Generate(3), Logits(), Feed((1,)), Generate(1)], "int4-g32")
    assert answer.runner == "pte"
    assert answer.runtime == f"executorch {described.tools['executorch'].partition('+')[0]}"
    assert (answer.vocab_size, answer.context_length) == (512, described.contract.kv.context_length)
    assert [feed.tokens for feed in answer.feeds] == [len(PROMPT), 1]
    assert [len(made.tokens) for made in answer.generated] == [3, 1]
    assert rows.shape == (1, 512)
    times = [answer.load_ns, *(feed.ns for feed in answer.feeds), *(ns for made in answer.generated for ns in made.ns)]
    assert min(times) > 0
    assert 0 < answer.rss_before_load_bytes < answer.peak_rss_bytes < 10**9


def test_the_runner_chooses_its_threads(bundle, artifacts, tmp_path):
    write_script([Feed(PROMPT)], tmp_path / "script")
    answer = started(bundle, artifacts["fp32"] / "model.pte", tmp_path / "script")
    assert answer.threads >= 1
    assert (answer.logits_rows, answer.logits_crc32) == (0, "00000000")


def test_no_library_of_the_bundle_comes_from_elsewhere(bundle):
    """`run` starts it without any environment; here, that it names no library beyond these and the system's."""
    ours = {Path(name).name for name in bundle.files}
    assert len(ours) == 6
    for name in bundle.files:
        listed = subprocess.run(
            ["readelf", "-d", bundle.path / name], capture_output=True, text=True, check=True
        ).stdout
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", listed))
        assert needed
        assert all(re.match(r"lib(c|m|dl|pthread|gcc_s|stdc\+\+)\.so|ld-linux", found) for found in needed - ours)


# what it refuses


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
    """Both readers of a script refuse the same lines; the good line before and after it is accepted."""
    script = f"feed 1\n{line}\nfeed 1\n"
    failure, _ = run(script)
    assert failure.stage == "usage"
    assert failure.error.startswith("script line 2: ")
    with pytest.raises(ValueError, match="script line 2: "):
        parse_script(script)
    assert isinstance(run("feed 1\nfeed 1\n")[0], Answer)


@pytest.mark.parametrize("script", EARLY)
def test_logits_come_after_a_feed(run, script):
    failure, _ = run(script)
    assert failure.stage == "usage"
    assert failure.error.endswith("there are no logits before a feed")
    with pytest.raises(ValueError, match="no logits before a feed"):
        parse_script(script)


def test_an_empty_script_is_refused(run):
    assert run("")[0].stage == "usage"
    with pytest.raises(ValueError, match="script line 1"):
        parse_script("")


def test_scripts_survive_writing_and_reading():
    commands = [Reset(), Feed((1, 2, 3)), Generate(4), Logits(), Top(5), Reset(), Feed((0, 10**9))]
    assert parse_script(script_text(commands)) == commands
    for wrong in ([Feed(())], [Feed((-1,))], [Feed((1,)), Generate(0)], [Logits()]):
        with pytest.raises(ValueError, match="script line"):
            script_text(wrong)


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
def test_wrong_arguments_are_told(bundle, artifacts, tmp_path, words, message):
    write_script([Feed(PROMPT), Logits()], tmp_path / "script")
    places = {"MODEL": artifacts["fp32"] / "model.pte", "SCRIPT": tmp_path / "script"}
    failure = started(bundle, *(places.get(word, word) for word in words))
    assert failure.stage == "usage"
    assert message in failure.error


@pytest.mark.parametrize("place", ["no-such-folder/logits", "/dev/full", "."])
def test_logits_that_cannot_be_written_are_an_error(bundle, artifacts, tmp_path, place):
    write_script([Feed(PROMPT), Logits()], tmp_path / "script")
    failure = started(bundle, artifacts["fp32"] / "model.pte", tmp_path / "script", "--logits", place)
    assert failure.stage == "run"
    assert failure.error.startswith(f"cannot write {place}: ")


@pytest.mark.parametrize("kept", [0, 1, 7, 31, 32, 100, 5_000, 20_000, 200_000, -1])
def test_a_truncated_model_is_refused(run, artifacts, tmp_path, kept):
    whole = (artifacts["int4-g32"] / "model.pte").read_bytes()
    (tmp_path / "cut.pte").write_bytes(whole[:kept])
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
    (_, real) = readback.open_pte(path).program.execution_plan[0].non_const_buffer_sizes
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
    shown = name if isinstance(name, str) else "raw?.pte"
    assert shown in failure.error


# what is made of its output

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
    ],
    ids=str,
)
def test_an_answer_that_is_not_the_documented_one_is_refused(changes):
    failure = parse_answer(line(**changes), 0)
    assert isinstance(failure, RunnerFailure)
    assert failure.stage == "protocol"
    assert next(iter(changes)) in failure.error


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
    for damaged, message in ((row.tobytes()[:-1], "15 bytes"), (b"\1" + row.tobytes()[1:], "CRC-32")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_logits(path, answer)


# how it is built


def test_a_bundle_is_built_once(bundle, monkeypatch):
    monkeypatch.setattr(build, "compile_target", None)
    assert build.build(bundle.abi) == bundle


def test_a_change_of_sources_is_another_bundle(bundle, monkeypatch, tmp_path):
    shutil.copytree(build.SOURCES, tmp_path / "sources")
    kit, compiler = sdk.find(bundle.abi, build.BUILD / "sdk"), build.compiler_for(bundle.abi)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    assert bundle.path.name == f"{bundle.abi}-{build.digest(kit, compiler)}"
    with (tmp_path / "sources" / "kernels" / "attention.h").open("a") as file:
        file.write("\n")
    assert bundle.path.name != f"{bundle.abi}-{build.digest(kit, compiler)}"


def test_a_failed_build_leaves_nothing(bundle, monkeypatch, tmp_path):
    shutil.copytree(build.SOURCES, tmp_path / "sources")
    (tmp_path / "sources" / "memory.cpp").write_text("syntax error\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    with pytest.raises(ExportError, match=r"runner: cmake failed: .*memory\.cpp:1:1: error"):
        build.build(bundle.abi, folder=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_tool_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sdk.UnavailableError, match=r"cmake: not found, .* install cmake"):
        build.build(build.host_abi(), folder=tmp_path)
    (tmp_path / "cmake").symlink_to("/bin/true")
    (tmp_path / "make").symlink_to("/bin/true")
    with pytest.raises(sdk.UnavailableError, match=r"aarch64-linux-gnu-g\+\+: .* install g\+\+-aarch64-linux-gnu"):
        build.build("aarch64", folder=tmp_path)


def test_a_wheel_that_cannot_be_had_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(sdk.UnavailableError, match=r"executorch .* for aarch64: pip download failed: ERROR"):
        sdk.find("aarch64", tmp_path / "sdk")
    assert list((tmp_path / "sdk").iterdir()) == []


# on another processor


@pytest.fixture(scope="session")
def arm():
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU}: not found; install qemu-user-static")
    return built("aarch64")


@pytest.mark.parametrize("processor", ["cortex-a72", "cortex-a76"])
def test_aarch64_gives_the_same_answers(run, arm, processor):
    """Started with its own C library, as on a device that has none of that kind. a72: no dot products; a76: with.

    Measured in float32: 1.9e-5, of logits up to 13.
    """
    ids = random_tokens(60)
    commands = [Feed(ids[:40]), Logits(), *steps(ids[40:]), Generate(10)]
    emulated = {"prefix": (shutil.which(QEMU), "-cpu", processor), "start": arm.start_alone, "folder": arm.path}
    here, rows = run(commands)
    there, emulated_rows = run(commands, **emulated)
    assert there.generated[0].tokens == here.generated[0].tokens
    assert np.abs(emulated_rows - rows).max() < 1e-4
    assert run([Feed(PROMPT), Generate(10)], "int4-g32", **emulated)[0].generated[0].tokens == (
        run([Feed(PROMPT), Generate(10)], "int4-g32")[0].generated[0].tokens
    )


def test_aarch64_uses_a_devices_own_c_library_where_there_is_one(run, arm):
    root = Path("/usr/aarch64-linux-gnu")
    if not (root / "lib" / "libstdc++.so.6").exists():
        pytest.skip(f"{root}: no libstdc++.so.6; install libstdc++6-arm64-cross")
    answer, _ = run([Feed(PROMPT)], prefix=(shutil.which(QEMU), "-L", root), start=arm.start, folder=arm.path)
    assert isinstance(answer, Answer)


def test_aarch64_errors_are_the_same(run, arm, tmp_path):
    emulated = {"prefix": (shutil.which(QEMU),), "start": arm.start_alone, "folder": arm.path}
    assert run("quit\n", **emulated)[0].stage == "usage"
    assert run([Feed(PROMPT)], tmp_path / "missing.pte", **emulated)[0].stage == "load"
    assert run([Feed((512,))], **emulated)[0].stage == "run"
