"""Validation over a transport, with this machine as the device: a good artifact passes, every accident has its name."""

import os
import shlex
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import devices
from devices import DeviceLostError, NoSpaceError
from export import manifest
from export.formats import load, storage
from runtime_tests import __main__ as cli
from runtime_tests import validate
from runtime_tests.device_runner import build, compilers, sdk
from runtime_tests.evidence.record import Outcome, newest_run
from runtime_tests.places.remote import AttachedDevice
from tests.support.fakes import boards
from tests.support.processes import FAKES
from tests.support.records import failed

WRAPPER = FAKES / "runner.py"


@pytest.fixture(scope="session")
def real_runner():
    """Ours for this machine, built once."""
    try:
        return build.build(compilers.host_abi()).path / "bin/runner"
    except sdk.UnavailableError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def folder(tiny, real_runner):
    return tiny("executorch-xnnpack")


@pytest.fixture
def desk(setting, tmp_path):
    """This machine as an attached device; `changed` are keys of its YAML, `worn` wraps its transport."""
    device = setting.device.model_copy(
        update={"targets": ("executorch-xnnpack",), "workdir": str(tmp_path / "there"), "threads": 1}
    )

    def attach(worn=lambda transport: transport, **changed):
        known = device.model_copy(update=changed)
        place = AttachedDevice(known, worn(devices.open_transport(known)), setting.scratch)
        return replace(setting, device=known, place=place)

    return attach


@pytest.fixture
def check(desk, folder, in_process):
    """Validate the tiny artifact on the desk."""

    def run(setting=None, artifact=folder):
        return validate.validate(artifact, manifest.read(artifact), setting or desk())

    return run


@pytest.fixture
def wrapped(tmp_path, real_runner):
    """A runner of the user's: ours with a fault."""

    def write(fault):
        path = tmp_path / f"runner-{fault}"
        program = path.with_suffix(".py")
        program.write_text(WRAPPER.read_text().replace("RUNNER", str(real_runner), 1).replace("KIND", fault, 1))
        path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(program)])} "$@"\n')  # of paths with spaces
        path.chmod(0o755)
        return path

    return write


def test_a_good_artifact_passes_every_gate(check, desk):
    setting = desk()
    record = check(setting)
    assert (record.outcome, record.detail, failed(record)) == (Outcome.PASS, "", set())
    assert {gate.name for gate in record.gates} >= {
        "lowering: mean KL", "cache: broken promises", "golden tokens", "tokens as on this machine: gap in logits",
        "decode tokens/s",
    }  # fmt: skip
    assert record.accuracy.lowering.positions == 3 * 65
    assert not record.emulated


def test_a_board_that_greets_passes_too(check, desk, monkeypatch, tmp_path):
    board, _ = boards.ssh(tmp_path, monkeypatch, before=r"printf 'Welcome\r\n\377'", after="echo bye; code=0")
    setting = desk(transport=board.transport)
    with closing(setting.place.transport):
        assert check(setting).outcome is Outcome.PASS


def test_the_record_says_what_ran_where(check):
    record = check()
    assert record.environment.cores == os.cpu_count()
    assert record.environment.tools.keys() == {"pte"}
    assert 0 < record.state_before.uptime_s <= record.state_after.uptime_s
    assert record.latency.first_third_ts > 0
    assert record.latency.last_third_ts > 0
    assert len(record.latency.token_samples_ns) == 5
    assert record.latency.n_threads == 1


@pytest.mark.parametrize(
    ("fault", "outcome", "words"),
    [
        ("crash", Outcome.CRASH, "artifact: crash: ended by SIGSEGV"),
        ("nonsense", Outcome.RUN_FAIL, "artifact: protocol: exit status 0"),
        (
            "old",
            Outcome.RUN_FAIL,
            "artifact: protocol: exit status 1: lib/libexecutorch.so: version `GLIBCXX_3.4.32' not found; its C "
            "library is older than the runner needs: install a newer system there",
        ),
        ("refuse", Outcome.LOAD_FAIL, "artifact: load: no such operator"),
        ("short", Outcome.RUN_FAIL, "bytes; the runner wrote"),
        ("garbled", Outcome.RUN_FAIL, "CRC-32"),
        ("none", Outcome.RUN_FAIL, "no file run/logits.f32"),
    ],
)
def test_a_runner_that_fails_gives_the_outcome_its_name(check, desk, wrapped, fault, outcome, words):
    record = check(desk(runner=wrapped(fault)))
    assert record.outcome is outcome
    assert words in record.detail
    assert "\n" not in record.detail
    assert record.accuracy.lowering is None


def test_an_own_runner_that_keeps_to_the_protocol_passes(check, desk, wrapped):
    assert check(desk(runner=wrapped("nothing"))).outcome is Outcome.PASS


def test_wrong_logits_are_a_mismatch(check, desk, wrapped):
    record = check(desk(runner=wrapped("wrong")))
    assert record.outcome is Outcome.MISMATCH
    assert {"lowering: mean KL", "lowering: top-1"} <= failed(record)


def test_a_runner_that_hangs_is_a_timeout(check, desk, wrapped):
    record = check(desk(runner=wrapped("hang"), time_limit_s=5.0))
    assert record.outcome is Outcome.TIMEOUT
    assert "was ended" in record.detail


def test_a_model_that_is_cut_on_the_device_does_not_load(check, desk, folder, tmp_path):
    class Cutting(Worn):
        def push(self, local, remote, **limits):
            super().push(local, remote, **limits)
            if remote.startswith("artifacts/"):
                model = tmp_path / "there" / remote / "model.pte"
                model.write_bytes(model.read_bytes()[:-1000])

    record = check(desk(Cutting))
    assert record.outcome is Outcome.LOAD_FAIL
    assert "model.pte: ExecuTorch error" in record.detail


class Worn:
    """A transport to which something happens."""

    def __init__(self, transport):
        self.transport = transport

    def push(self, local, remote, **limits):
        self.transport.push(local, remote, **limits)

    def run(self, argv, **limits):
        return self.transport.run(argv, **limits)

    def __getattr__(self, name):
        return getattr(self.transport, name)


class Unplugged(Worn):
    """Lost as soon as a model is to run, and forever."""

    lost = False

    def run(self, argv, **limits):
        self.lost = self.lost or any(word.endswith("model.pte") for word in argv)
        if self.lost:
            raise DeviceLostError("desk: the cable is out")
        return super().run(argv, **limits)


def test_a_lost_device_is_named_and_still_described(check, desk):
    record = check(desk(Unplugged))
    assert (record.outcome, record.detail) == (Outcome.DEVICE_LOST, "artifact: desk: the cable is out")
    assert record.environment.cores == os.cpu_count()


def test_a_device_lost_before_the_timings_is_no_error_of_ours(check, desk):
    setting = desk()
    setting.place.state = lambda: (_ for _ in ()).throw(DeviceLostError("desk: gone"))
    assert check(setting).outcome is Outcome.DEVICE_LOST


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def small(tmp_path, folder, real_runner):
    """A device with room for a runner, the artifact and `spare` bytes."""

    def holding(spare):
        there, needed = tmp_path / "there", size(real_runner.parents[1]) + size(folder)

        class Small(Worn):
            def push(self, local, remote, **limits):
                if not (there / remote).exists() and size(there) + size(local) > needed + spare:
                    raise NoSpaceError("desk: full")
                super().push(local, remote, **limits)

        return Small

    return holding


def test_memory_is_about_what_was_computed(check, folder):
    measured = check().latency.peak_rss_bytes
    assert measured / 1.4 < load("pte").process_bytes(manifest.read(folder)) < 1.4 * measured


def test_a_device_with_too_little_memory_is_refused_before_any_work(desk, folder, tmp_path):
    place, described = desk().place, manifest.read(folder)
    needed = storage.process(described)
    place.facts = f"memory_kb=9000\n{place.facts}"
    with pytest.raises(
        devices.DeviceError, match=f"takes {needed} with a full context, the device has 9 MB"
    ) as refusal:
        place.prepare([described])
    assert "--context" in str(refusal.value)
    assert not list((tmp_path / "there").glob("run*/*"))
    place.facts = place.facts.partition("\n")[2]
    place.prepare([described])
    assert list((tmp_path / "there").glob("runners/*"))


def test_what_other_artifacts_left_there_makes_room(check, desk, small, tmp_path):
    old = tmp_path / "there/artifacts/it's old/model.pte"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(500_000))
    assert check(desk(small(spare=100_000))).outcome is Outcome.PASS
    assert not old.parent.exists()
    assert len(list((tmp_path / "there/artifacts").iterdir())) == 1


def test_what_others_left_stays_while_there_is_room(check, desk, tmp_path):
    old = tmp_path / "there/artifacts/old/model.pte"
    old.parent.mkdir(parents=True)
    old.touch()
    assert check(desk()).outcome is Outcome.PASS
    assert old.exists()


def test_a_device_that_is_too_small_is_full(check, desk, small):
    record = check(desk(small(spare=-100_000)))
    assert (record.outcome, record.detail) == (Outcome.DEVICE_FULL, "artifact: desk: full")


# the command


@pytest.fixture
def attached_command(command, desk, in_process, monkeypatch, capsys):
    """`python -m runtime_tests` on this machine as an attached device; exit status, records, lines of error."""

    def run(*folders, worn=lambda transport: transport, **changed):
        device = desk(**changed).device
        real = devices.open_transport
        monkeypatch.setattr(cli, "here", lambda device: False)
        monkeypatch.setattr(cli.devices, "load", lambda name: device)
        with monkeypatch.context() as patch:
            patch.setattr(cli.devices, "open_transport", lambda device: worn(real(device)))
            code = command("--device", "desk", *folders)
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        return code, newest_run(Path("build/records/records.jsonl"), device.name), errors, out

    return run


def test_the_command_passes_and_leaves_what_the_next_run_needs(attached_command, folder, tmp_path):
    code, (record,), errors, _ = attached_command(folder)
    assert (code, errors, record.outcome) == (0, [], Outcome.PASS)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["artifacts", "runners"]


def test_every_artifact_of_a_lost_device_has_its_line_in_the_table(attached_command, folder):
    code, records, errors, out = attached_command(folder, folder, worn=Unplugged)
    assert (code, errors) == (1, [])
    assert [record.outcome for record in records] == [Outcome.DEVICE_LOST] * 2
    assert out.count("the cable is out") == 2


def test_a_second_run_is_one_line(attached_command, folder, desk):
    with desk().place.transport.lock():
        code, records, (error,), _ = attached_command(folder)
    assert (code, records) == (1, [])
    assert f"in use by process {os.getpid()}" in error


def test_a_runner_that_is_not_there_is_one_line_before_any_work(attached_command, folder):
    code, records, (error,), _ = attached_command(folder, runner=Path("no/such/runner"))
    assert (code, records) == (1, [])
    assert "runner: no file" in error
    assert "build it first, or set it to null" in error


def test_an_artifact_the_device_does_not_run_is_one_line(attached_command, tiny):
    code, records, (error,), _ = attached_command(tiny("onnx-cpu"))
    assert (code, records) == (1, [])
    assert "does not run onnx-cpu; it runs executorch-xnnpack" in error
