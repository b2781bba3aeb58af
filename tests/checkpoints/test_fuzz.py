"""Files made at random from good ones: whatever they hold, reading them ends soon, and in no error but our own."""

import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import devices
from devices import Device, DeviceError
from export import checkpoints, errors, formats, manifest, plan
from export.checkpoints import open_source, safetensors, tokenizer
from export.checkpoints.gguf import header as gguf_header
from export.checkpoints.origin import adapted, parse_origin
from export.errors import ExportError
from export.plan import ModelSpec, QuantRecipe, Target
from export.toolbox import verification
from runtime_tests.coreml import package as mil_package
from tests.support import fuzz
from tests.support.checkpoints import ADAPTER, ADAPTER_CONFIG, FORMS, INDEX, LLAMA, PTH, write_folder, write_gguf
from tests.support.fuzz import CHANGES, EDITS, changed, count, fuzzed, json_like, only, spliced

pytestmark = pytest.mark.fuzz


# ── YAML ────────────────────────────────────────────────────────────────────────────────────────────────────────────

YAML_FILES = {
    "recipe": (QuantRecipe, "quant/int4-mixed"),
    "model": (ModelSpec, "models/llama32-1b-instruct"),
    "target": (Target, "targets/coreml"),
}
TEXTS = st.text(max_size=60) | st.sampled_from([
    "[" * 5000, "a: 2001-99-99", "a: &a [*a]", "? [1]\n: 2", "1: 2", "a: !!binary x", "a: 0x", "\x00",
    "a: 1:99:99:99:9",
])  # fmt: skip


@pytest.mark.reliability("YAML of a {kind} made by chance", "read, or one line")
@pytest.mark.parametrize("kind", YAML_FILES)
def test_yaml(tmp_path, kind, record_property):
    cls, name = YAML_FILES[kind]
    good = yaml.safe_load((plan.CONFIGS / f"{name}.yaml").read_text())
    path = tmp_path / "made.yaml"
    refused = []

    @fuzzed
    @given(CHANGES.map(lambda changes: yaml.safe_dump(changed(good, changes))) | TEXTS)
    def read(text):
        path.write_text(text, encoding="utf-8")
        refused.append(only(ExportError, errors.load_record, cls, path))

    read()
    count(refused, record_property)


@pytest.mark.reliability("YAML of a {kind} made by chance", "read, or one line")
@pytest.mark.parametrize("kind", ["device"])  # fills in the mark's text
def test_device_yaml(tmp_path, monkeypatch, kind, record_property):
    good = yaml.safe_load((devices.FOLDER / "pixel-8.yaml").read_text())
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    refused = []

    @fuzzed
    @given(CHANGES.map(lambda changes: yaml.safe_dump(changed(good, changes))) | TEXTS)
    def read(text):
        (tmp_path / "made.yaml").write_text(text, encoding="utf-8")
        refused.append(only(DeviceError, devices.load, "made"))

    read()
    count(refused, record_property)
    assert "name" in Device.model_fields


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.hostile("artifact", "manifests made by chance", "verified, or named in lines")
@pytest.mark.reliability("manifest.json made by chance", "verified, or named in lines")
def test_manifest_json(artifact, monkeypatch, record_property):
    monkeypatch.setattr(verification, "in_child", lambda folder, limit_s: [])
    good = json.loads((artifact / manifest.FILE).read_text())
    refused = []

    @fuzzed
    @given(json_like(good) | st.binary(max_size=60))
    def check(data):
        (artifact / manifest.FILE).write_bytes(data)
        problems = verification.verify(artifact, 100)
        assert not any("\n" in line for line in problems)
        refused.append(bool(problems))

    check()
    count(refused, record_property)


FILES = {
    "safetensors": ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"),
    "shards": (INDEX,),
    "lora": (ADAPTER_CONFIG,),
    "gptq": ("config.json",),
    "torchao": ("config.json",),
    "bitsandbytes": ("config.json",),
    "jq4": ("config.json",),
    "meta": ("params.json",),
}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a checkpoint of a form as a build does, in an empty folder with an empty home; both must stay empty."""
    place, rooms = tmp_path / "checkpoint", [tmp_path / name for name in ("home", "here", "out")]
    for room in rooms:
        room.mkdir()
    monkeypatch.setenv("HOME", str(rooms[0]))
    monkeypatch.chdir(rooms[1])

    def everything(form):
        origin = parse_origin(str(place))
        loaded = checkpoints.load(LLAMA, adapted(origin, place / ADAPTER) if form == "lora" else origin)
        for name in loaded.architecture.tensor_shapes():
            loaded.read(name)
        with tempfile.TemporaryDirectory(dir=rooms[2]) as out:
            tokenizer.write(loaded.source, Path(out), loaded.architecture.vocab_size)

    yield place, everything
    assert [path for room in rooms for path in room.rglob("*")] == []


@pytest.mark.hostile("checkpoint", "headers, JSON and zips made by chance", "read, or one line")
@pytest.mark.parametrize(("form", "name"), [(form, name) for form, names in FILES.items() for name in names])
def test_json_of_a_checkpoint(opened, form, name, record_property):
    place, read = opened
    if form == "bitsandbytes":
        pytest.importorskip(form)
    FORMS[form](place)
    path, refused = place / name, []
    good = json.loads(path.read_bytes()) if path.is_file() else {"bos_token_id": 1, "eos_token_id": [2, 3]}

    @fuzzed
    @given(json_like(good))
    def check(data):
        path.write_bytes(data)
        refused.append(only(ExportError, read, form))

    check()
    count(refused, record_property)


@pytest.mark.hostile("checkpoint", "headers, JSON and zips made by chance", "read, or one line")
def test_a_zip_of_tensors(opened, record_property):
    """The central directory, the pickle and the names in it."""
    place, read = opened
    FORMS["meta"](place)
    path, refused = place / PTH, []
    good = path.read_bytes()
    pickle, directory = good.index(b"data.pkl"), good.rindex(b"PK\x01\x02", 0, good.rindex(b"PK\x05\x06"))

    @fuzzed
    @given(st.sampled_from([0, pickle, directory - 500, len(good) - 200]), EDITS)
    def check(start, edits):
        path.write_bytes(good[:start] + spliced(good[start : start + 1500], edits) + good[start + 1500 :])
        refused.append(only(ExportError, read, "meta"))

    check()
    count(refused, record_property)


# ── binary headers, by our own readers ──────────────────────────────────────────────────────────────────────────────


def gguf(path):
    gguf_header.check(path)
    open_source(parse_origin(str(path)), None)


@pytest.mark.hostile("checkpoint", "headers, JSON and zips made by chance", "read, or one line")
@pytest.mark.reliability("{kind} header made by chance", "read, or one line")
@pytest.mark.parametrize("kind", ["safetensors", "GGUF"])
def test_headers(tmp_path, kind, record_property):
    if kind == "GGUF":
        path, read, header = write_gguf(tmp_path / "model.gguf", kind="Q8_0"), gguf, 6000
    else:
        path, read, header = write_folder(tmp_path / "model") / "model.safetensors", safetensors.read, 1500
    good = path.read_bytes()
    refused = []

    @fuzzed
    @given(EDITS)
    def check(edits):
        path.write_bytes(spliced(good[:header], edits) + good[header:])
        refused.append(only(ExportError, read, path))

    check()
    count(refused, record_property)


@pytest.mark.reliability("{target} graph made by chance", "read, or one line")
@pytest.mark.parametrize("target", ["onnx-cpu", "executorch-xnnpack", "coreml"])
def test_graphs(tiny, tmp_path, target, record_property):
    """`inspect` of a bare file; where native code reads, see tests/build/test_damage.py."""
    folder = shutil.copytree(tiny(target), tmp_path / "artifact")
    described = manifest.read(folder)
    file, reader = folder / described.plan.target.artifact, formats.reader(described.plan.target.backend)
    path = file / "Data/com.apple.CoreML/model.mlmodel" if file.is_dir() else file
    good, head = path.read_bytes(), min(path.stat().st_size, 8000)
    refused = []

    @fuzzed
    @given(EDITS)
    def check(edits):
        path.write_bytes(spliced(good[:head], edits) + good[head:])
        refused.append(only(ExportError, formats.contents, reader, file, None))

    check()
    count(refused, record_property)


@pytest.mark.reliability("weight.bin and program read by the Core ML evaluator, made by chance", "read, or one line")
def test_the_evaluators_package_reader(tiny, tmp_path, record_property):
    package = shutil.copytree(tiny("coreml") / "model.mlpackage", tmp_path / "model.mlpackage")
    files = [package / "Data/com.apple.CoreML" / name for name in ("model.mlmodel", "weights/weight.bin")]
    good = [path.read_bytes() for path in files]
    refused = []

    @fuzzed
    @given(st.integers(0, 1), EDITS)
    def check(which, edits):
        for path, data in zip(files, good, strict=True):
            path.write_bytes(spliced(data[:8000], edits) + data[8000:] if path is files[which] else data)
        refused.append(only(mil_package.PackageError, mil_package.load, package))

    check()
    count(refused, record_property)


def refuse(words):
    raise ExportError(words)


def test_a_foreign_exception_or_a_hang_is_seen(monkeypatch):
    """The twin: what this file asserts can fail."""
    with pytest.raises(KeyError):
        only(ExportError, {}.__getitem__, "x")
    monkeypatch.setattr(fuzz, "LIMIT_S", 1)
    with pytest.raises(pytest.fail.Exception, match="still at it"):
        only(ExportError, time.sleep, 60)
    with pytest.raises(AssertionError):
        only(ExportError, refuse, "one line\nand another")
