"""Around a run on an attached device: its facts, its cooling, jobs as scripts of the runner."""

import json
import subprocess

import numpy as np
import pytest

from devices import CoolDown
from runtime_tests import jobs
from runtime_tests.checks import speed
from runtime_tests.device_runner import Answer, Feed, Generate, Logits, Reset, Rewind, script_text
from runtime_tests.evidence.record import Environment, Outcome
from runtime_tests.jobs import scripts
from runtime_tests.places import facts

PHONE = """\
os=Android 14, google/shiba/shiba:14/UQ1A/11:user/release-keys
cpu=Tensor G3
model=Pixel 8
kernel=Linux 5.15.110
machine=aarch64
cores=9
memory_kb=7600000
load=1.25
uptime=7200.5
governor=sched_pixel
online=0-8
affinity=0-8
zone=BIG:41000
zone=LITTLE:38.5
zone=BIG:39000
zone=broken:-274000
zone=:12
battery=81
charging=Discharging
noise
"""
CONTEXT, VOCAB = 64, 8


def test_a_device_says_what_it_is():
    machine = facts.environment(PHONE, {"pte": "executorch 1.5.1"})
    assert (machine.cpu, machine.cores, machine.memory_bytes) == ("Pixel 8, Tensor G3", 9, 7600000 * 1024)
    assert machine.os.startswith("Android 14")
    assert machine.os.endswith("Linux 5.15.110")
    state = facts.state(PHONE)
    assert state.temperatures_c == {"BIG": 41.0, "LITTLE": 38.5, "BIG#2": 39.0}
    assert (state.battery_percent, state.charging, state.governor) == (81.0, False, "sched_pixel")


def test_what_a_device_does_not_tell_is_null():
    state = facts.state("")
    assert state.temperatures_c == {}
    assert {state.battery_percent, state.charging, state.governor, state.load_average_1min} == {None}
    assert facts.environment("", {}).cpu == "not told"


def test_the_script_runs_here():
    ended = subprocess.run(["sh", "-c", facts.SCRIPT], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    assert facts.environment(ended.stdout, {}).memory_bytes > 2**28


def hot(*degrees):
    readings = iter(degrees)
    return lambda: facts.state(f"zone=cpu:{next(readings)}")


def test_timing_waits_for_a_device_to_cool_down_but_not_for_ever():
    slept = []
    rule = CoolDown(max_c=45.0, limit_s=12.0)
    assert speed.wait_until_cool(hot(60, 50, 44), rule, slept.append) == ""
    assert len(slept) == 2
    assert "cpu still at 60" in speed.wait_until_cool(hot(*[60] * 9), rule, slept.append)
    assert speed.wait_until_cool(lambda: facts.state(""), rule, slept.append) == ""


class FakeRunner:
    """A model whose logits are the number of tokens fed since the last reset, within its context."""

    def __init__(self, *, context=CONTEXT, forgets=True):
        self.context, self.forgets = context, forgets

    def __call__(self, commands):
        script_text(commands)  # refuses what a runner would refuse
        length, rows, feeds, generated = 0, [], [], []
        for command in commands:
            match command:
                case Reset():
                    length = 0 if self.forgets else length + 1
                case Rewind(kept):
                    length = kept
                case Feed(tokens):
                    length += len(tokens)
                    feeds.append({"tokens": len(tokens), "ns": 10 * len(tokens)})
                case Generate(count):
                    generated.append({"tokens": list(range(count)), "ns": [7] * count})
                    length += count
                case Logits():
                    rows.append(np.full(VOCAB, length, np.float32))
            if length > self.context:
                raise scripts.RunnerStoppedError(Outcome.RUN_FAIL, "context")
        answer = {
            "runner": "fake", "runtime": "fake 1", "threads": 1, "vocab_size": VOCAB, "context_length": self.context,
            "load_ns": 5, "feeds": feeds, "generated": generated, "top": [], "logits_rows": len(rows),
            "logits_crc32": "00000000", "rss_before_load_bytes": 1, "peak_rss_bytes": 2,
        }  # fmt: skip
        return Answer.model_validate_json(json.dumps(answer)), np.array(rows)


CONFORMANCE = jobs.ConformanceJob(folder="", threads=1, fill=True)


def test_a_cache_that_keeps_its_promises_has_no_failures():
    assert scripts.conformance(CONFORMANCE, CONTEXT, FakeRunner()) == {"failures": []}
    short = CONFORMANCE.model_copy(update={"fill": False})
    assert scripts.conformance(short, CONTEXT, FakeRunner()) == {"failures": []}


def test_a_cache_that_remembers_or_overflows_is_found():
    assert (
        "after a reset"
        in scripts.conformance(CONFORMANCE, CONTEXT, FakeRunner(context=999, forgets=False))["failures"][0]
    )
    assert "past the context" in scripts.conformance(CONFORMANCE, CONTEXT, FakeRunner(context=999))["failures"][0]


def test_windows_of_all_tasks_are_prefilled_and_then_fed_token_by_token_in_as_few_runs_as_may_be(monkeypatch):
    tasks = [(np.arange(12).reshape(2, 6), 3), (np.array([[7, 8, 9]]), 1)]
    ((parts, script),) = scripts.window_scripts(tasks, VOCAB)
    assert parts == [(0, 3), (0, 3), (1, 2)]
    assert script[:7] == [Reset(), Feed((0, 1, 2)), Logits(), Feed((3,)), Logits(), Feed((4,)), Logits()]
    assert script[14:] == [Reset(), Feed((7,)), Logits(), Feed((8,)), Logits()]
    split = {6: [[(0, 3), (0, 3)], [(1, 2)]], 5: [[(0, 3)], [(0, 3), (1, 2)]], 1: [[(0, 3)], [(0, 3)], [(1, 2)]]}
    for rows, runs in split.items():  # one window that is too much has a run of its own
        monkeypatch.setattr(scripts, "LOGITS_BYTES", rows * VOCAB * 4)
        assert [parts for parts, _ in scripts.window_scripts(tasks, VOCAB)] == runs


def test_timings_come_apart_as_they_were_asked_for():
    job = jobs.SpeedJob(
        folder="", threads=1, tokens=tuple(range(8)), prompts=(4, 8, 60), generate=5, repeats=5, warmups=1
    )
    raw = scripts.speed(job, CONTEXT, FakeRunner())
    assert raw["prompts"] == {4: [40] * 5, 8: [80] * 5}  # 60 + 5 do not fit
    assert raw["decode"] == [[7] * 5] * 5
    assert (raw["first_ns"], raw["load_ns"]) == (40, 5)


@pytest.mark.parametrize("text", ["9" * 400, "-" + "9" * 16, "1e308", "nan", "inf", "0x10", "٣", "-3", "0"])
def test_absurd_numbers_of_a_device_are_unknown_or_bounded(text):
    machine = facts.environment(f"cores={text}\nmemory_kb={text}\nload={text}\n", {})
    assert machine.cores == 1
    assert machine.memory_bytes == 0
    assert Environment.model_validate_json(machine.model_dump_json()) == machine


def test_a_devices_words_are_short_and_plain_and_few():
    machine = facts.environment("cpu=\x1b[2J\x07A76" + "x" * 10**6 + "\nos=never read", {})
    assert machine.cpu.isprintable()
    assert (len(machine.cpu), machine.os) == (300, "not told")
    assert len(facts.state("zone=a:40000\n" * 10**6).temperatures_c) < 10**4
