"""A device that answers anything between our marks: a valid value or one line, never another error."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import devices
from devices import Completed, DeviceError
from devices.transports import lock, marks, processes
from tests.support.fuzz import VALUES, count, fuzzed, json_like, only

pytestmark = pytest.mark.fuzz
WORDS = st.sampled_from([
    b"/data/run", b"aarch64", b"64", b"32", b"", b"arm64-v8a", b"Pixel 8", b"Filesystem", b"/dev/x 9 9 1000 9% /",
    b"9 " * 3 + b"9" * 5000 + b" 1% /", b"0" * 64 + b"  sent", b"\xff\xfe", b"\x1b[2J", b"\r", "\u2028\u0661".encode(),
])  # fmt: skip
OUTPUTS = st.lists(WORDS | st.binary(max_size=20), max_size=8).map(b"\n".join)
STATUSES = st.sampled_from([0, 0, 0, 1, 3, 127, 255])


@pytest.fixture
def stranger(monkeypatch, tmp_path):
    """Opens an attached device whose answers are given, one after the other; the last one is repeated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RASPBERRY_PI_5_HOST", "board")
    known = devices.load("raspberry-pi-5")
    answers = []

    class Link:
        name = "board"

        def client(self, script):
            return [script]

        def explain(self, ended):
            return devices.last_line(ended.stderr.decode(errors="replace"))

        def close(self):
            pass

    def call(argv, deadline, **options):
        status, out, raw = answers.pop(0) if len(answers) > 1 else answers[0]
        if raw:
            return Completed(status, out, out)
        mark = "".join(re.search(r"%s%s%s\\n' (\w+) (\w+) ", argv[0]).groups()).encode()
        said = mark + b"\n" + out + mark + b"%d\n" % status
        return Completed(0, said, said)

    monkeypatch.setattr(processes, "call", call)
    monkeypatch.setattr(processes, "call_held", call)
    monkeypatch.setattr(type(known.transport), "connect", lambda *_: Link())

    def visit(given_answers):
        answers[:] = given_answers
        transport = devices.open_transport(known)
        answers.append((0, b"", False))
        transport.run(["true"], timeout_s=5)
        with transport.lock():
            (tmp_path / "sent").write_bytes(b"x")
            transport.push(tmp_path / "sent", "sent", timeout_s=5)
            transport.pull("sent", tmp_path / "back", timeout_s=5)

    return visit


@pytest.mark.hostile("device", "answers made by chance", "a value, or one line")
def test_answers_of_a_device(stranger, record_property):
    refused = []
    opened = st.just((0, b"/data/run\naarch64\n64\n", False))
    answers = st.tuples(STATUSES, OUTPUTS, st.booleans())

    @fuzzed
    @given(st.lists(answers, min_size=1, max_size=6) | st.tuples(opened, answers, answers, answers).map(list))
    def visit(given_answers):
        refused.append(only(DeviceError, stranger, given_answers))

    visit()
    count(refused, record_property)


def test_owners_of_a_lock():
    """Whoever wrote it: the holder is named, or taken for one that cannot be asked."""
    good = lock.Owner.this_process().model_dump()

    @fuzzed
    @given(json_like(good) | st.dictionaries(st.sampled_from(sorted(good)), VALUES).map(
        lambda changes: json.dumps(good | changes).encode()
    ))  # fmt: skip
    def read(data):
        def ask(script):
            return Completed(lock.HELD if "mkdir" in script else 0, data, b"")

        assert only(DeviceError, lock.take, ask, "board", "/data")

    read()


def test_marks_around_any_output():
    mark = marks.new()

    @fuzzed
    @given(OUTPUTS, st.integers(0, 255), st.binary(max_size=30))
    def told(out, status, noise):
        said = noise + mark.encode() + b"\n" + out + mark.encode() + b"%d\n" % status + noise
        answer = marks.answer(Completed(0, said, said), mark)
        assert (answer.returncode, answer.stdout, answer.stderr) == (status, out, out)
        assert marks.answer(Completed(status, out, out), mark) is None

    told()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (b"", "reports '' as its folder, '' as its processor: its shell does not run scripts as sh does"),
        (b"/data/run", "reports '/data/run' as its folder, '' as its processor"),
        (b"../run\naarch64\n64\n", "reports '../run' as its folder"),
        (b"/data/run\n../../x\n64\n", "'../../x' as its processor"),
    ],
)
def test_a_device_without_a_folder_or_processor_is_named(stranger, told, words):
    with pytest.raises(DeviceError, match=re.escape(words)):
        stranger([(0, told, False)])


def test_free_space_of_five_thousand_digits_is_no_number(stranger):
    table = b"Filesystem\n/dev/x 9 9 " + b"9" * 5000 + b" 9% /\n"
    with pytest.raises(DeviceError, match=r": /data/run cannot be read"):
        stranger([(0, b"/data/run\naarch64\n64\n", False), (0, b"", False), (0, b"", False), (0, table, False)])


@pytest.mark.parametrize("change", [{"pid": "x"}, {"pid": -1}, {"pid": 2**40}, {"started": "x"}, {"host": "a\nb\x1b"}])
def test_an_owner_that_is_none_is_another_run(change):
    owner = json.dumps(lock.Owner.this_process().model_dump() | change).encode()
    held = lock.HELD
    with pytest.raises(devices.DeviceBusyError, match=r"^board: in use by (another run|process \d+ on a\\nb\\x1b )"):
        lock.take(lambda script: Completed(held if "mkdir" in script else 0, owner, b""), "board", "/data")
