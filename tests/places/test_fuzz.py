"""What a device tells of itself, and what a runner answers: a value, or a reason in one line."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import manifest
from runtime_tests import jobs
from runtime_tests.checks import speed
from runtime_tests.device_runner import Answer, Feed, Generate, fitting, parse_answer
from runtime_tests.evidence.record import DeviceState, Environment
from runtime_tests.jobs import isolation, scripts
from runtime_tests.jobs.scripts import RunnerStoppedError
from runtime_tests.places import facts
from tests.support.fuzz import DEEP, TEXTS, count, fuzzed, json_like, only

pytestmark = pytest.mark.fuzz
KEYS = st.sampled_from(["os", "cpu", "cores", "memory_kb", "load", "zone", "battery", "charging", "uptime", "x"])
WORDS = TEXTS | st.sampled_from(["nan", "inf", "-1", "1e9", "9" * 400, "cpu:70000", ":1", "cpu#2:5", "٣"])


def test_facts_of_a_device():
    """A record of them can be read again."""

    @fuzzed
    @given(st.lists(st.tuples(KEYS, WORDS).map("=".join) | WORDS, max_size=12).map("\n".join))
    def tell(text):
        environment, state = facts.environment(text, {}), facts.state(text)
        for told in (environment, state):
            assert type(told).model_validate_json(told.model_dump_json()) == told
        assert isinstance(environment, Environment)
        assert isinstance(state, DeviceState)
        assert environment.cores >= 1

    tell()


GOOD = {
    "runner": "pte", "runtime": "executorch", "threads": 1, "vocab_size": 512, "context_length": 256, "load_ns": 5,
    "feeds": [{"tokens": n, "ns": 9} for n in (4, *[4] * 3, *[8] * 3, *[4] * 3)],
    "generated": [{"tokens": [1, 2], "ns": [3, 4]}] * 3, "top": [], "logits_rows": 0, "logits_crc32": "00000000",
    "rss_before_load_bytes": 1, "peak_rss_bytes": 2,
}  # fmt: skip


@pytest.mark.hostile("device", "answers made by chance", "a value, or one line")
def test_answers_of_a_runner(built, record_property):
    """What was timed becomes numbers of a record that can be read again."""
    described, refused = manifest.read(built), []
    job = jobs.SpeedJob(folder="", threads=1, tokens=tuple(range(8)), prompts=(4, 8), generate=2, repeats=2, warmups=1)

    def answered(data, status):
        def execute(commands):
            answer = parse_answer(b"noise\n" + data, status, data)
            if not isinstance(answer, Answer):
                raise RunnerStoppedError(scripts.Outcome.RUN_FAIL, " ".join(answer.error.split()))
            try:
                fitting(answer, commands, 512)
            except ValueError as error:
                raise RunnerStoppedError(scripts.Outcome.RUN_FAIL, str(error)) from None
            return answer, np.empty((0, 0), np.float32)

        raw = json.loads(json.dumps(scripts.speed(job, 256, execute)))
        measured = speed.summarize(raw, described, 1, None)
        assert type(measured).model_validate_json(measured.model_dump_json()) == measured

    answered(json.dumps(GOOD).encode(), 0)

    @fuzzed
    @given(json_like(GOOD) | json_like({"error": "no", "stage": "run"}), st.sampled_from([0, 0, 0, 1, 2, 3, 139, 255]))
    def check(data, status):
        refused.append(only(RunnerStoppedError, answered, data, status))

    check()
    count(refused, record_property)


@pytest.mark.parametrize("data", DEEP)
def test_the_last_line_of_a_child_is_an_answer_or_a_reason(data):
    ended = isolation.interpret(0, data.decode(errors="replace"), "")
    assert (ended.outcome, "no JSON result" in ended.detail) == ("run fail", True)


@pytest.mark.parametrize(("text", "cores", "memory"), [
    ("cores=-1\nmemory_kb=-5", 1, 0),
    (f"cores={'9' * 400}\nmemory_kb={'9' * 400}", 1, 0),
    ("cores=8\nmemory_kb=1", 8, 1024),
])  # fmt: skip
def test_a_number_that_no_machine_has_is_not_known(text, cores, memory):
    environment = facts.environment(text, {})
    assert (environment.cores, environment.memory_bytes) == (cores, memory)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"feeds": []}, "feeds"), ({"generated": []}, "generated"), ({"logits_rows": 3}, "logits_rows"),
        ({"vocab_size": 4}, "vocab_size"), ({"top": [[[1, 1.0]]]}, "top"),
        ({"generated": [{"tokens": [1, 512], "ns": [3, 4]}] * 3}, "generated tokens outside the vocabulary"),
    ],
)  # fmt: skip
def test_an_answer_to_another_script_is_refused(change, named):
    commands = [Feed((1,) * fed["tokens"]) for fed in GOOD["feeds"]] + [Generate(2)] * 3
    assert fitting(parse_answer(json.dumps(GOOD).encode(), 0), commands, 512)
    with pytest.raises(ValueError, match=f"not to this script: {named} differ"):
        fitting(parse_answer(json.dumps(GOOD | change).encode(), 0), commands, 512)
