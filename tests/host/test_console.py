"""Progress where there is no terminal, what is awaited, and what native libraries write past Python."""

import fcntl
import os
import re
import sys
import threading

import pytest

from export.host import console, disk, timings


class Err:
    """What was printed on stderr so far."""

    def __init__(self, capsys):
        self.capsys, self.text = capsys, ""

    def wait(self, pattern, patience_s=60.0):
        ticks = threading.Event()
        for _ in range(int(patience_s / 0.01)):
            self.text += self.capsys.readouterr().err
            if re.search(pattern, self.text, re.MULTILINE):
                return
            ticks.wait(0.01)
        pytest.fail(f"no {pattern!r} in {self.text!r}")


@pytest.fixture
def err(capsys, monkeypatch):
    monkeypatch.setattr(console, "_EVERY_S", 0.01)
    return Err(capsys)


def test_a_long_step_says_what_is_done_and_how_far(err):
    with console.stage("lower", "ONNX"):
        err.wait(r"^  lower +\d+\.\d s so far: ONNX$")
        for done in console.track(range(1, 3), "weights", 2):
            err.wait(rf"^  weights +\d+\.\d s so far: {done - 1} of 2(, about 0 s more)?$")
        with console.counted("artifact") as show:
            err.wait(r"^  artifact +\d+\.\d s so far$")
            show(3, 8)
            err.wait(r"^  artifact +\d+\.\d s so far: 3 of 8$")
    err.wait(r"^  lower +\d+\.\d s  ONNX$")
    assert console._steps == []


def test_what_is_counted_says_how_long_the_rest_takes(err, monkeypatch):
    clock = iter((0.0, 50.0, 60.0, 60.0))  # begun, first counted, printed and its pace
    step = console._Step("artifact", started=next(clock))
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    step.count(20, 60)
    assert step.first == (20, 50.0)
    step.count(25, 60)
    assert step.line() == "  artifact     60.0 s so far: 25 of 60, about 70 s more"


def test_the_timings_are_of_stages_that_hold_no_other(capsys):
    with console.stage("examining"):
        for name in ("coreml  ", "onnx-cpu"):
            with console.lane(name), console.stage("weighing"), console.counted("weights"):
                timings.add("weighing", name, 2.0)
        with console.stage("nothing"):
            pass
    console.show_timings()
    said = capsys.readouterr().err
    assert re.search(r"^where the time went: \d+\.\d s, \d+\.\d s of processors$", said, re.MULTILINE)
    assert re.search(r"^  weighing +4\.\d s  (coreml|onnx-cpu) 2\.0, (coreml|onnx-cpu) 2\.0$", said, re.MULTILINE)
    assert re.search(r"^  others ", said, re.MULTILINE)
    assert len(re.findall("examining", said)) == 1  # its own end


def test_threads_side_by_side_say_whose_work_each_line_is_of(err):
    def work(name):
        with console.lane(name), console.stage("artifact", "8 windows"):
            console.note(f"one of {name}")
            ended.wait()

    ended, names = threading.Event(), ("coreml", "onnx-cpu")
    with console.stage("examine"):
        workers = [threading.Thread(target=work, args=(name,)) for name in names]
        for worker in workers:
            worker.start()
        for name in names:
            err.wait(rf"^{name} \|   note: one of {name}$")
            err.wait(rf"^{name} \|   artifact +\d+\.\d s so far: 8 windows$")
        err.wait(r"^  examine +\d+\.\d s so far$")
        ended.set()
        for worker in workers:
            worker.join()
    for name in names:
        err.wait(rf"^{name} \|   artifact +\d+\.\d s  8 windows$")


def test_who_waits_says_for_what_again_and_again(err, tmp_path):
    store = tmp_path / "store"
    with (tmp_path / ".store.lock").open("w+") as held:
        held.write("17137")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)

        def write():
            with console.stage("quantize"), disk.turn(store):
                pass

        other = threading.Thread(target=write)
        other.start()
        reason = re.escape(f"{store}: process 17137 is writing it")
        err.wait(rf"^  waiting: {reason}$")
        err.wait(rf"^  waiting +\d+\.\d s so far: {reason}$")
    other.join()
    err.wait(r"^  quantize +\d+\.\d s  $")


def test_native_words_are_held_back_and_shown_where_the_block_fails(capfd):
    with console.native_held():
        os.write(2, b"[cpuinfo_utils.cpp:71] Reading file\n")
        print("[cpuinfo_utils.cpp:71] Reading file", file=sys.stderr)  # as pybind11 does for it
        console.console.print("ours")
    assert capfd.readouterr().err == "ours\n"
    with pytest.raises(UnicodeEncodeError), console.native_held():
        "\udc80".encode(errors="strict" if os.write(2, b"why it \x1bfailed\n") else "")
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "why it \\x1bfailed\nafter\n"
