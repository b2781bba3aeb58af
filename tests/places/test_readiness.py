"""What a validation on a device would miss is told before anything is built, in one line."""

from contextlib import contextmanager

import pytest
import yaml

import devices
from devices import DeviceBusyError, DeviceError
from export.build.command import run
from export.errors import ExportError
from runtime_tests import __main__ as cli
from runtime_tests.device_runner import compilers
from runtime_tests.places import readiness
from tests.support.artifacts import OWN_LIMITS


class Answering:
    """A device that answers; `run` is what its Python says."""

    def __init__(self, abi, python=b"3.11\n", busy=False):
        self._abi, self.python, self.busy, self.closed = abi, python, busy, False

    def abi(self):
        return self._abi

    @contextmanager
    def lock(self):
        if self.busy:
            raise DeviceBusyError("board: another run holds it")
        yield

    def run(self, argv, *, timeout_s):
        assert argv[0] == "python3"
        return devices.Completed(0 if self.python else 127, self.python, b"python3: not found")

    def close(self):
        self.closed = True


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Ask about a device; `answering` or an error is what its connection gives, `tools` the programs there are here."""

    def ask(name, answering=None, tools=(), **changes):
        def connect(device, *, timeout_s):
            if isinstance(answering, Exception):
                raise answering
            return answering

        (tmp_path / "bin").mkdir()
        for tool in tools:
            (tmp_path / "bin" / tool).symlink_to("/bin/true")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setattr(compilers, "_zig", lambda: None)
        monkeypatch.setattr(readiness, "open_transport", connect)
        monkeypatch.setattr(readiness.lab, "lacks", lambda: None)
        readiness.require(devices.load(name).model_copy(update=changes))

    return ask


CROSS = ("cmake", "make", "aarch64-linux-gnu-g++")


def test_a_device_that_can_be_given_its_runners(asked):
    board = Answering("aarch64")
    asked("raspberry-pi-5", board, CROSS)
    assert board.closed


@pytest.mark.parametrize(
    ("name", "answering", "tools", "changes", "line"),
    [
        ("pixel-8", DeviceError("pixel-8: no Android device is attached"), CROSS, {}, "no Android device is attached"),
        ("raspberry-pi-5", Answering("aarch64", busy=True), CROSS, {}, "another run holds it"),
        (
            "raspberry-pi-5",
            Answering("aarch64"),
            CROSS[:2],
            {},
            r"aarch64-linux-gnu-g\+\+: not found, .*; .* g",
        ),
        ("raspberry-pi-5", Answering("aarch64", python=b""), CROSS, {}, "no python3 there that runs"),
        ("pixel-8", Answering("armeabi-v7a"), CROSS, {}, "there is no runner for armeabi-v7a"),
        ("pixel-8", Answering("arm64-v8a"), (), {}, "cmake: not found"),
        ("pixel-8", Answering("arm64-v8a"), (), {"runner": "no/runner"}, "pixel-8.yaml: runner: no file"),
        ("emulated-android", None, CROSS[:1], {}, "make: not found"),
    ],
)
def test_what_is_missing_is_one_line(asked, name, answering, tools, changes, line):
    with pytest.raises(ExportError, match=line) as refused:
        asked(name, answering, tools, **changes)
    assert "\n" not in str(refused.value)
    assert answering is None or isinstance(answering, Exception) or answering.closed


def test_an_emulated_device_needs_the_lab(monkeypatch):
    monkeypatch.setattr(readiness.lab, "lacks", lambda: "root: it makes namespaces and mounts")
    with pytest.raises(ExportError, match="emulated-pi5: the lab needs root"):
        readiness.require(devices.load("emulated-pi5"))


def test_nothing_is_asked_of_this_machine(monkeypatch):
    monkeypatch.setattr(readiness, "open_transport", None)
    readiness.require(devices.load("host"))


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ([], 0, ""),
        (["--skip-proven", "--eval", "languages", "--limits", "mine.yaml"], 0, ""),
        (["--skip-provn"], 2, "error: No such option: --skip-provn"),
        (["--eval", "langauges"], 1, "unknown name 'langauges' in configs/evals; did you mean languages?"),
        (["--limits", "none.yaml"], 2, "'none.yaml' does not exist"),
        (["--limits", "bad.yaml"], 1, "error: bad.yaml: quant: missing; target: missing"),
        (["--source", "nowhere"], 1, "error: nowhere: no such file or folder"),
    ],
)
def test_options_that_validation_cannot_take_are_told_too(monkeypatch, tmp_path, capsys, words, code, line):
    monkeypatch.chdir(tmp_path)
    limits = {"quant": {"max_mean_kl": 1, "min_top1": 0}, "target": OWN_LIMITS}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(limits))
    (tmp_path / "bad.yaml").write_text("{}")
    monkeypatch.setattr("sys.argv", ["runtime_tests", "ready", "host", *words])
    ended = run(cli.app)
    assert (ended, line in " ".join(capsys.readouterr().err.split())) == (code, True)
