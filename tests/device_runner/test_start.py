"""A runner that does not start on a device is one line, in the device's own words, before any work."""

import re
from contextlib import closing

import pytest

import devices
from export.errors import ExportError
from runtime_tests.device_runner import build, onnx_kv, parse_answer, pte, sdk
from tests.support.fakes import boards
from tests.support.reliability import FOREIGN_WORDS

pytestmark = FOREIGN_WORDS

QUICK_S = 30
OLD_GLIBC = "ImportError: libc.so.6: version `GLIBC_2.38' not found (required by onnxruntime_pybind11_state.so)"
USAGE = """echo '{"error": "no model", "stage": "usage"}'; exit 2"""


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A board whose python3 tells its version and then does `does`; gives its device and transport."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/module.py").touch()
    monkeypatch.setattr(onnx_kv, "_site_packages", lambda abi, python: tmp_path / "packages")
    device, _ = boards.ssh(tmp_path, monkeypatch, before="echo hello; PATH=$PWD/../tools:$PATH")

    def attach(does, version="echo 3.11"):
        put(tmp_path / "tools/python3", f"if [ $1 = -c ]; then {version}; exit; fi\n{does}")
        return device, devices.open_transport(device)

    return attach


@pytest.mark.parametrize(
    ("does", "words"),
    [
        (f'echo "{OLD_GLIBC}" >&2; exit 1'.replace("`", r"\`"), f"{OLD_GLIBC}; its C library is older than the runner"),
        ("echo 'sh: 1: python3: not found' >&2; exit 127", "sh: 1: python3: not found; it is not there, or the loader"),
        (
            "printf 'Traceback\\n  x\\nImportError: a.so: wrong ELF class: ELFCLASS64\\n\\n' >&2; exit 1",
            "ImportError: a.so: wrong ELF class: ELFCLASS64; its programs are not of the kind that it reports",
        ),
        (
            "printf '    with (\\n         ^\\nSyntaxError: invalid syntax\\n' >&2; exit 1",
            "SyntaxError: invalid syntax; its Python is too old: install Python 3.11 or later there",
        ),
        (
            "echo 'ImportError: libgomp.so.1: cannot open shared object file: No such file or directory' >&2; exit 1",
            "No such file or directory; install that library there",
        ),
        (
            "echo 'Error loading shared library ld-linux-aarch64.so.1: No such file (needed by a.so)' >&2; exit 1",
            "(needed by a.so); its C library is not GNU's (musl?)",
        ),
        (
            "echo 'ImportError: a.so: failed to map segment from shared object' >&2; exit 1",
            "its file system may allow no programs (noexec): set workdir in devices/*.yaml to one that does",
        ),
        (
            "echo 'sh: python3: Permission denied' >&2; exit 126",
            "python3: Permission denied; its file system may allow",
        ),
        ("echo \"ModuleNotFoundError: No module named 'ctypes'\" >&2; exit 1", "install the whole of Python there"),
        ("echo 'OSError: [Errno 28] No space left on device' >&2; exit 1", "free some space on the device"),
        (
            "printf 'Anders\\n\\033[31mals gedacht\\377\\n' >&2; exit 9",
            "exit status 9: als gedacht\N{REPLACEMENT CHARACTER}",
        ),
        ("kill -ILL $$", "crash: ended by SIGILL"),
        ("exit 1", "exit status 1: no reason given"),
    ],
)
def test_the_devices_own_words_and_the_remedy(board, does, words):
    device, transport = board(does)
    with closing(transport), pytest.raises(ExportError, match=re.escape(words.removeprefix("crash: "))) as refused:
        onnx_kv.install(transport, device, timeout_s=QUICK_S)
    line = str(refused.value)
    assert line.startswith("raspberry-pi-5: the runner does not start there: ")
    assert line.isprintable()


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("echo 'sh: 1: python3: not found' >&2; exit 127", "(sh: 1: python3: not found; it is not there, or"),
        ("echo 'libpython3.11.so.1.0: cannot open shared object file' >&2; exit 1", "(libpython3.11.so.1.0: cannot"),
        ("echo 'Use the app store'; exit 0", "(no reason given)"),
    ],
)
def test_a_python_that_does_not_run_is_named_before_anything_is_sent(board, tmp_path, version, words):
    device, transport = board(USAGE, version)
    line = "raspberry-pi-5: no python3 there that runs, which the ONNX runner needs "
    with closing(transport), pytest.raises(ExportError, match=re.escape(line + words)):
        onnx_kv.install(transport, device, timeout_s=QUICK_S)
    assert not (tmp_path / "home/llama-on-device/runners").exists()


def test_a_runner_that_answers_is_started_as_it_was_tried(board):
    device, transport = board(USAGE, version="echo Welcome; echo 3.11")
    with closing(transport):
        start = onnx_kv.install(transport, device, timeout_s=QUICK_S)
    assert start[-3:] == ("python3", "-m", "sessions.onnx_kv")


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A runner whose program does `program`, and with its own C library `loader`."""

    def make(program, loader):
        put(tmp_path / "bundle/bin/runner", program)
        put(tmp_path / "bundle/loader/ld-linux-aarch64.so.1", loader)
        monkeypatch.setattr(pte.build, "build", lambda abi: build._Bundle(tmp_path / "bundle", abi))
        device, _ = boards.ssh(tmp_path, monkeypatch)
        return device, devices.open_transport(device)

    return make


def test_where_the_systems_c_library_does_not_start_the_runner_it_brings_its_own(bundle, monkeypatch):
    warnings = []
    monkeypatch.setattr(pte._LOG, "warning", lambda text, *words: warnings.append(text % words))
    device, transport = bundle("echo 'sh: bin/runner: not found' >&2; exit 127", USAGE)
    with closing(transport):
        start = pte.install(transport, device, timeout_s=QUICK_S)
    assert start[0] == "runners/bundle/loader/ld-linux-aarch64.so.1"
    note = "127: sh: bin/runner: not found: the runner is started with the C library that it brings"
    assert note in warnings[0]


@pytest.mark.parametrize(("prefix", "first"), [("", "loader/ld-linux-aarch64.so.1"), ("/android", "bin/runner")])
def test_on_android_the_runner_brings_its_c_library_or_was_built_for_androids(bundle, monkeypatch, prefix, first):
    monkeypatch.setenv(sdk.ANDROID, prefix)
    device, transport = bundle(USAGE, USAGE)
    monkeypatch.setattr(transport, "abi", lambda: "arm64-v8a")
    with closing(transport):
        start = pte.install(transport, device, timeout_s=QUICK_S)
    assert start[0] == f"runners/bundle/{first}"


def test_a_runner_that_starts_in_no_way_is_one_line(bundle):
    device, transport = bundle("exit 127", "echo 'loader: Permission denied' >&2; exit 126")
    line = (
        "raspberry-pi-5: the runner does not start there: exit status 126: loader: Permission denied; its file system"
    )
    with closing(transport), pytest.raises(ExportError, match=re.escape(line)):
        pte.install(transport, device, timeout_s=QUICK_S)


def test_a_runner_that_ends_later_is_told_in_the_devices_words_too():
    failure = parse_answer(b"loading\n", 1, b"Traceback\nMemoryError\n")
    assert (failure.stage, failure.error) == ("protocol", "exit status 1: MemoryError")
