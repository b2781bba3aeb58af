"""A build that would write the same again is not run; one that would not is, and says why."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from export import __main__ as command
from export import checkpoints, formats, manifest, pipeline
from export.build import skip
from export.checkpoints.origin import adapted, parse_origin
from export.host import digests, disk
from export.pipeline import export
from export.plan import load_plan
from export.quantization.keys import content_key
from tests.support.checkpoints import write_folder, write_gguf
from tests.support.reliability import IDENTITY


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source):
    pytest.importorskip("onnx", reason="onnx is not installed")
    out = tmp_path_factory.mktemp("built") / "llama_int4-g32_onnx-cpu"
    export(plan(), parse_origin(str(source)), out)
    return out


TEMPLATE = "additional_chat_templates/rag.jinja"


def plan(quant="int4-g32", **changes):
    wanted = load_plan("llama", quant, "onnx-cpu")
    return wanted.model_copy(update={"model": wanted.model.model_copy(update=changes)})


def reasons(place, folder, **changes):
    return skip.reasons(plan(**changes), parse_origin(str(place)), folder)


def altered(folder, **fields):
    """Its manifest, said to have been made otherwise."""
    described = json.loads((folder / manifest.FILE).read_text())
    for path, value in fields.items():
        *parents, last = path.split("__")
        inner = described
        for name in parents:
            inner = inner[name]
        inner[last] = value
    (folder / manifest.FILE).write_text(json.dumps(described))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / folder.name)


def test_nothing_changed(folder, source):
    assert reasons(source, folder) == []


def test_folders_that_a_build_would_write_anew_are_told(folder, source, export_command):
    options = ("--source", source, "--name", "llama", "--out", folder.parent)
    words = ("folders", "llama", "int4-g32", "onnx-cpu", "coreml", *options)
    both = f"{folder}\n{folder.parent}/llama_int4-g32_coreml\n"
    assert export_command(*words)[1] == both
    assert export_command(*words, "--stale")[1] == both.partition("\n")[2]
    assert (
        export_command("folders", "llama", "fp32", "onnx-cpu", *options[:4], "--out", folder, "--stale")[1]
        == f"{folder}\n"
    )


def test_nothing_there(source, tmp_path):
    assert reasons(source, tmp_path / "none") == ["not built yet"]


def test_each_change_is_named(copy, source, tmp_path):
    assert reasons(source, copy, context_length=128) == ["model.context_length: 128, was 2048"]
    other = write_gguf(tmp_path / "model.gguf")
    assert reasons(other, copy) == ["checkpoint: local:model.gguf, was local:model"]
    altered(copy, tools__torchao="0.1")
    assert reasons(source, copy) == [f"torchao: {formats.tool_versions()['torchao']}, was 0.1"]
    altered(copy, tools__torchao=formats.tool_versions()["torchao"], source__sha256="0" * 64, source__commit="f" * 40)
    assert reasons(source, copy)[0].startswith("export/: changed since commit ffffffffffff")


@IDENTITY
def test_a_changed_checkpoint_is_seen_whatever_its_size_and_time(copy, tmp_path):
    moved = write_folder(tmp_path / "model")
    assert reasons(moved, copy) == []
    weights = moved / "model.safetensors"
    state, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert reasons(moved, copy) == [f"{weights}: changed"]
    weights.unlink()
    assert reasons(moved, copy) == [f"model.safetensors: not found in {moved}"]


def test_a_hub_model_is_looked_up_in_the_hubs_cache(copy, source, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("c0ffee")
    shutil.copytree(source, snapshot / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    altered(copy, checkpoint__origin="hub:owner/name")
    assert reasons("hub:owner/name", copy) == []
    weights = snapshot / "snapshots/c0ffee/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert reasons("hub:owner/name", copy) == [f"{weights}: changed"]
    altered(copy, checkpoint__origin="hub:owner/other")
    missing = reasons("hub:owner/other", copy)
    assert missing
    assert all(reason.endswith("not found in hub:owner/other") for reason in missing)


@IDENTITY
def test_a_changed_tokenizer_is_built_again_and_the_file_named(copy, tmp_path, capsys):
    moved = write_folder(tmp_path / "model")
    assert reasons(moved, copy) == []
    (moved / "additional_chat_templates").mkdir()
    for name in ("special_tokens_map.json", "added_tokens.json", "generation_config.json", TEMPLATE):
        (moved / name).write_text("{}")
        assert reasons(moved, copy) == [f"{moved / name}: new"]
        (moved / name).unlink()
    tokenizer = moved / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert reasons(moved, copy) == [f"{tokenizer}: changed"]
    assert skip.is_stale(plan(), parse_origin(str(moved)), copy, explain=True)
    assert f"{plan().id}: {tokenizer}: changed" in capsys.readouterr().err
    tokenizer.unlink()
    assert reasons(moved, copy) == [f"tokenizer.json: not found in {moved}"]


@IDENTITY
def test_every_file_that_the_tokenizer_is_made_of_decides_the_key(tmp_path):
    folder, keys, recipe = write_folder(tmp_path / "model"), set(), plan("int4-g32-gptq-chat").quant
    (folder / "additional_chat_templates").mkdir()
    names = (None, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", TEMPLATE)
    for name in names:
        if name is not None:
            (folder / name).write_text((folder / name).read_text() + " " if (folder / name).is_file() else "{}")
        opened = checkpoints.load(plan().model, parse_origin(str(folder)))
        assert TEMPLATE in opened.sha256 or name != TEMPLATE
        keys.add(content_key(opened, recipe, None))
    assert len(keys) == len(names)


@IDENTITY
def test_of_an_adapter_the_tokenizer_counts_that_is_read(tmp_path):
    base, adapter = write_folder(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "tokenizer_config.json").write_text("{}")  # without a tokenizer.json nothing of it is read
    origin = adapted(parse_origin(str(base)), adapter)
    recorded = {path.name: digests.sha256(path) for path in skip.tokenizer_of(origin)}
    assert recorded.keys() == {path.name for path in skip.tokenizer_of(origin.base)}
    assert list(skip.changed_files(recorded, origin)) == []
    shutil.copyfile(base / "tokenizer.json", adapter / "tokenizer.json")
    assert skip.tokenizer_of(origin)[0] == adapter / "tokenizer.json"
    (base / "generation_config.json").write_text("{}")
    recorded = {path.name: digests.sha256(path) for path in skip.tokenizer_of(origin)}
    (base / "tokenizer.json").write_text("{}")
    assert list(skip.changed_files(recorded, origin)) == []
    (base / "generation_config.json").write_text("{ }")
    (adapter / "tokenizer.json").write_text("{}")  # now that of the base, which is not read
    assert [change.text for change in skip.changed_files(recorded, origin)] == [
        f"{adapter / 'tokenizer.json'}: changed",
        f"{base / 'generation_config.json'}: changed",
    ]


def test_a_damaged_artifact_is_built_again(copy, source):
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    reason = reasons(source, copy)
    assert reason == [f"{copy / 'model.onnx.data'}: differs from manifest.json (sha256)"]


@IDENTITY
def test_a_changed_calibration_text_is_seen(copy, source):
    text = manifest.CalibrationInfo(texts={"prose.txt": "0" * 64}, day=None, tokens=1, held_out_kl=None, candidates=())
    altered(copy, quantization__calibration=json.loads(text.model_dump_json()))
    assert reasons(source, copy) == ["configs/calibration/prose.txt: changed"]


def test_the_command_builds_once_and_explains(tmp_path, source, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": "llama", "quant": "int4-g32", "target": ["onnx-cpu"], "source": str(source)}
    command.main(**arguments, explain=True)
    assert "model_int4-g32_onnx-cpu: not built yet" in capsys.readouterr().err
    built = tmp_path / "build/model_int4-g32_onnx-cpu"
    before = (built / manifest.FILE).stat().st_mtime_ns
    monkeypatch.setattr(pipeline, "export", pytest.fail)
    command.main(**arguments)
    assert "build/model_int4-g32_onnx-cpu: up to date" in capsys.readouterr().err
    assert (built / manifest.FILE).stat().st_mtime_ns == before


def test_an_unchanged_build_imports_no_torch(folder, source):
    code = (
        "import sys; from export.build import skip; from export.plan import load_plan; from pathlib import Path;"
        "from export.checkpoints.origin import adapted, parse_origin;"
        "plan = load_plan('llama', 'int4-g32', 'onnx-cpu');"
        f"print(skip.reasons(plan, parse_origin({str(source)!r}), Path({str(folder)!r})), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


# ── the cache's size ────────────────────────────────────────────────────────────────────────────────────────────────


def keep(folder, name, age_h, size=1000):
    path = folder / name
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age_h * 3600,) * 2)
    return path


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(disk, "load_record", lambda cls, path: cls(name="cache", limit_gb=2500 / 1e9))


@pytest.mark.usefixtures("small")
def test_what_was_not_used_for_longest_goes_first(tmp_path):
    old, older, newer = (keep(tmp_path, name, age) for name, age in (("old", 30), ("older", 40), ("newer", 20)))
    disk.trim(tmp_path)
    assert [path.exists() for path in (older, old, newer)] == [False, True, True]
    disk.used(old)
    keep(tmp_path, "another", 25)
    disk.trim(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer", "old"]


@pytest.mark.usefixtures("small")
def test_what_may_be_in_use_stays(tmp_path):
    recent = [keep(tmp_path, f"recent-{i}", 1) for i in range(5)]
    disk.trim(tmp_path)
    assert all(path.exists() for path in recent)


def test_within_the_limit_nothing_goes(tmp_path):
    kept, lock = keep(tmp_path, "old", 1000), keep(tmp_path, ".old.lock", 2000, size=5000)
    disk.trim(tmp_path)
    disk.trim(tmp_path / "none")
    assert kept.exists()
    assert lock.exists()
