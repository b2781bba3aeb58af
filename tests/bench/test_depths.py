"""Timing far into a context: caches are really filled, and ratios are those of one repetition."""

import tempfile

import pytest

from export import checkpoints, manifest
from export.plan import ModelSpec, load_named
from runtime_tests.bench import depths, forms, runners
from runtime_tests.bench.depths import Contender, Depths, Sample, Steps
from runtime_tests.bench.runners import Runner
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import Opening
from tests.support.records import here

NEAR, FAR = 64, 8192


def opening(runner, path):
    return Opening(runner=runner, path=str(path), tokenizer="", context=256, threads=1)


@pytest.mark.parametrize(("target", "runner"), [("executorch-xnnpack", "device_runner"), ("onnx-cpu", "session")])
def test_tokens_are_timed_at_positions_that_were_never_fed(tiny, tmp_path, monkeypatch, target, runner):
    """Whatever the path of temporary files is: a runner's script takes names without spaces, and ASCII."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "Übung & Prüfung"))
    (tmp_path / "Übung & Prüfung").mkdir()
    folder = tiny(target)
    path = folder if runner == "session" else folder / manifest.read(folder).plan.target.artifact
    opened = runners.module(runner).open_runner(opening(runner, path))
    lists = opened.decode_at((4, 250), 4)
    assert [len(times) for times in lists] == [4, 4]
    assert min(map(min, lists)) > 0
    with pytest.raises((ValueError, RuntimeError), match="the context holds 256"):
        opened.decode_at((253,), 4)
    if runner == "session":  # no slot is still what the system gave, which costs no memory
        assert all(buffer.all() for buffer in opened.session.buffers().values())


def test_a_runtime_that_keeps_its_cache_to_itself_says_so():
    class Closed(Runner):
        prompt = generate = logits = lambda *_: None

    with pytest.raises(ValueError, match="Closed cannot fill its cache but with 96 tokens"):
        Closed().decode_at((64,), 32)


def test_llama_cpps_cache_is_filled_from_its_own_state(tmp_path):
    """Not q8_0: moving such keys of this model's small heads ends llama.cpp 0.3.36 with a signal."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peers`)")
    forms.write_gguf(checkpoints.load(load_named(ModelSpec, "models", "tiny"), None), tmp_path)
    for flash, kind in ((False, "f16"), (True, "f16")):
        asked = opening("llamacpp", tmp_path / forms.GGUF).model_copy(update={"kv": kind, "flash_attention": flash})
        opened = runners.module("llamacpp").open_runner(asked)
        opened.session.largest_call = 32  # pieces of 32
        assert [len(times) for times in opened.decode_at((200, 20), 4)] == [4, 4]
        with pytest.raises(ValueError, match="the context holds 256"):
            opened.decode_at((253,), 4)


def contender(name, *, ours, cache, target=""):
    return Contender(name=name, ours=ours, target=target, cache=cache, opening=opening("x", "y"))


def sample(name, repetition, near_ms, far_ms):
    steps = {position: (round(ms * 1e6),) * 3 for position, ms in ((NEAR, near_ms), (FAR, far_ms))}
    timing = Steps(prompt=(512, 10**9), steps=steps, peak_rss_bytes=10**9)
    return Sample(contender=name, repetition=repetition, outcome=Outcome.PASS, detail="", timing=timing)


@pytest.fixture
def run():
    """Three repetitions, the second on a machine half as fast. int8's attention takes a quarter of float32's."""
    names = {"ours": (10, 30), "ours8": (10, 15), "theirs": (20, 60), "theirs8": (25, 50)}
    return Depths(
        model="m",
        quant="q",
        command="c",
        checkpoint="seeded",
        commit="0" * 40,
        environment=here(),
        threads=2,
        positions=(NEAR, FAR),
        generate=3,
        contenders=(
            contender("ours", ours=True, cache="float32", target="t"),
            contender("ours8", ours=True, cache="int8", target="t"),
            contender("theirs", ours=False, cache="f16"),
            contender("theirs8", ours=False, cache="q8_0"),
        ),
        samples=tuple(
            sample(name, i, near * slow, far * slow)
            for i, slow in enumerate((1, 2, 1))
            for name, (near, far) in names.items()
        ),
        missing={},
    )


def test_ratios_are_of_the_fastest_of_each_side_and_of_attention(run):
    rows = {row[0]: row[1:] for row in depths.compared(run)}
    assert rows["our fastest / llama.cpp's fastest"] == ("2.00 (2.00–2.00)", "3.33 (3.33–3.33)", "–")
    assert rows[f"our fastest / itself at {NEAR}"][1] == "0.67 (0.67–0.67)"
    assert rows["ours8 / float32"] == ("1.00 (1.00–1.00)", "2.00 (2.00–2.00)", "1.00 (1.00–1.00)")
    assert rows["attention of ours8: float32's time / its own"] == ("–", "4.00 (4.00–4.00)", "–")
    assert not any("theirs8 / float32" in row for row in rows)
    text = depths.page(run)
    assert "| ours8 | 100.0 (60.0–100.0) | 66.7 (40.0–66.7) | 512 (512–512) | 1000 |" in text
