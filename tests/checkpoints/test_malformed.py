"""The catalogue of malformed checkpoints through the real command: one line each, nothing left, in bounded time."""

import json
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest

from export import checkpoints, manifest, pipeline
from export.__main__ import app
from export.build.command import run as run_app
from export.checkpoints import folder as huggingface
from export.checkpoints import gguf, safetensors
from export.checkpoints.origin import adapted, parse_origin
from export.errors import ExportError
from tests.support.checkpoints import FILE, FORMS, GGUF, LLAMA, arguments, read_everything
from tests.support.harms import MARKER, Execute
from tests.support.malformed import CATALOGUE, HUGE, write
from tests.support.processes import FAKES, within

pytest.importorskip("onnx", reason="onnx is not installed")
PLAN = ["llama", "int4-g32", "onnx-cpu"]
LIMIT_BYTES, LIMIT_S = 2**29, 60
FLIPS = 100


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A whole checkpoint of every form that can be written here."""
    place = tmp_path_factory.mktemp("pristine")
    for form, write_form in FORMS.items():
        if form != "bitsandbytes" or find_spec(form):
            write_form(place / form)
    return place


@pytest.fixture
def written(pristine):
    """Skips a form that cannot be written here."""

    def require(form):
        if not (pristine / form).is_dir():
            pytest.skip(f"{form} is not installed")

    return require


@pytest.fixture
def build(monkeypatch, capsys, tmp_path):
    """`python -m export` in this process, in a folder of its own; exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "CACHE", tmp_path / "cache")

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["export", *PLAN, *options])
        with within(LIMIT_S):
            code = run_app(app)
        return code, capsys.readouterr().err

    return run


def refused(name, code, stderr):
    """A command ended as it should: exit code, one line, the words."""
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    one_line = len(errors) == 1 and stderr.rstrip().endswith(errors[0]) and len(errors[0]) < 1000
    assert code in {1, 2}, stderr
    assert one_line, stderr
    assert "Traceback" not in stderr
    assert re.search(CATALOGUE[name].words, errors[0]), errors[0]


GOOD_LINE = "error: /x/model.safetensors: damaged safetensors (why); download or save it again"


@pytest.mark.parametrize(
    ("code", "stderr"),
    [
        (0, GOOD_LINE), (-1, GOOD_LINE), (139, GOOD_LINE), (1, ""), (1, f"{GOOD_LINE}\n{GOOD_LINE}"),
        (1, f"Traceback (most recent call last):\n{GOOD_LINE}"), (1, f"{GOOD_LINE}\nand more"), (1, "error: no"),
    ],
)  # fmt: skip
def test_another_end_would_be_seen(code, stderr):
    """The twin: any other end fails the assertion."""
    refused("safetensors: seven bytes", 1, f"stage\n{GOOD_LINE}\n")
    with pytest.raises(AssertionError):
        refused("safetensors: seven bytes", code, stderr)


def test_the_catalogue_holds_at_least_60_mistakes_of_every_form():
    counts = Counter(mistake.form for mistake in CATALOGUE.values())
    print(f"\n{len(CATALOGUE)} malformed checkpoints: {', '.join(f'{count} {form}' for form, count in counts.items())}")
    assert len(CATALOGUE) >= 60
    assert set(counts) == set(FORMS) - {"gguf q8"}
    assert min(counts.values()) >= 5
    assert len(HUGE) >= 15


@pytest.mark.reliability(
    "checkpoints of nine forms made malformed, through the command", "exit 1 or 2, one line, nothing left"
)
@pytest.mark.parametrize("name", CATALOGUE)
def test_a_malformed_checkpoint_ends_in_one_line_and_leaves_nothing(build, pristine, written, tmp_path, name):
    written(CATALOGUE[name].form)
    options = write(name, pristine, tmp_path / "source")
    before = sorted(path.name for path in tmp_path.iterdir())
    refused(name, *build(*options, "--out", str(tmp_path / "out")))
    left = {path.name for path in tmp_path.iterdir()} - set(before)
    assert left <= {".out.lock", "cache"}
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_checkpoint_of_every_form_is_read(pristine, written, form):
    """The twin: untouched, each form is read, so the refusals above are about what was spoiled."""
    written(form)
    _, place, *adapter = arguments(form, pristine / form)
    spec = adapted(parse_origin(place), pristine / form / "adapter") if adapter else place
    assert len(read_everything(LLAMA, spec)) == 11


def test_an_executed_pickle_would_leave_its_marker(monkeypatch, tmp_path):
    """The twin of the check on hostile pickles: loaded without protection, they do run."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Execute()))
    assert (tmp_path / MARKER).exists()


@pytest.mark.linux
def test_huge_claims_in_little_memory_and_time(pristine, tmp_path):
    """In a child process limited to half a gigabyte more than a whole build took, and a minute for each file."""
    out = ["--out", str(tmp_path / "out")]
    names = [name for name in HUGE if (pristine / CATALOGUE[name].form).is_dir()]
    options_of = {name: write(name, pristine, tmp_path / f"{i}") for i, name in enumerate(names)}
    whole = [*PLAN, *arguments("safetensors", pristine / "safetensors"), "--out"]
    request = {
        "bytes": LIMIT_BYTES, "seconds": LIMIT_S, "cache": str(tmp_path / "cache"),
        "first": [*whole, str(tmp_path / "first")],
        "runs": [*([*PLAN, *options, *out] for options in options_of.values()), [*whole, str(tmp_path / "last")]],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, FAKES / "sources.py", json.dumps(request)], cwd=tmp_path, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    first, *ends, last = answer["ends"]
    for name, (code, stderr) in zip(names, ends, strict=True):
        refused(name, code, stderr)
    assert (first[0], last[0]) == (0, 0), last  # the limit leaves room for a build
    assert not answer["claimed"]  # and is one
    assert not (tmp_path / "out").exists()


def test_the_real_command_ends_with_1_and_one_line(pristine, tmp_path):
    options = write("meta: a pickle that runs a command", pristine, tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-m", "export", *PLAN, *options, "--out", str(tmp_path / "out")], cwd=manifest.ROOT,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    refused("meta: a pickle that runs a command", done.returncode, done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert not (manifest.ROOT / MARKER).exists()


# ── flipped bits ────────────────────────────────────────────────────────────────────────────────────────────────────


def header_bytes(form, data):
    """Length of the part of a file that holds its structure."""
    return data.index(b"token_embd") + 2000 if form == "gguf" else 8 + int.from_bytes(data[:8], "little")


READERS = {
    "safetensors": (FILE, lambda path: safetensors.SafetensorsFiles(path.parent).shapes),
    "jq4": (FILE, safetensors.read),
    "gguf": (GGUF, lambda path: gguf.GgufSource(path).architecture),
}


@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize("seed", range(FLIPS // 25))
def test_a_flipped_bit_in_a_header_raises_nothing_but_export_error(pristine, tmp_path, form, seed):
    """25 flips for each seed."""
    name, read = READERS[form]
    folder = shutil.copytree(pristine / form, tmp_path / "source")
    good, choose, refusals = (folder / name).read_bytes(), random.Random(seed), 0
    for _ in range(25):
        at, bit = choose.randrange(header_bytes(form, good)), choose.randrange(8)
        (folder / name).write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        with within(LIMIT_S):
            line = refusal_of(read, folder / name)
        assert "\n" not in line
        refusals += bool(line)
    assert refusals >= 5, "most bits of a header matter"


def refusal_of(read, path):
    """A reader's error about a file; an empty text where it reads it."""
    try:
        read(path)
    except ExportError as error:
        return str(error)
    return ""


def test_readers_are_the_ones_the_command_uses(pristine):
    """The twin: without a flip each reader gives what it should."""
    for form, (name, read) in READERS.items():
        assert read(pristine / form / name), form
    assert isinstance(checkpoints.open_source(parse_origin(str(pristine / "jq4")), None), huggingface.FolderSource)
