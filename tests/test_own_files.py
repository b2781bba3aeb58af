"""YAMLs and texts in the current folder go before ours and are told, where they can only be the user's."""

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import devices
from export import errors, manifest
from export.build import skip
from export.errors import ExportError
from export.plan import CONFIGS, QuantRecipe, load_named, load_plan, names
from export.quantization import texts
from runtime_tests import device_runner, evaluation, jobs, validate
from runtime_tests.checks import limits, tokens
from runtime_tests.evidence import proof
from runtime_tests.jobs import isolation
from tests.support.records import failed


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The current folder, with an empty `configs` and `devices`."""
    place = tmp_path / "my app"
    for kind in ("models", "quant", "mixtures", "targets", "evals", "calibration", "evals/text"):
        (place / "configs" / kind).mkdir(parents=True)
    (place / "devices").mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def said():
    """Lines about the user's own files, each told once in a process."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    errors._say.cache_clear()
    logging.getLogger(errors.__name__).addHandler(handler)
    yield lines
    logging.getLogger(errors.__name__).removeHandler(handler)


@pytest.fixture
def mine(here):
    """Writes a YAML or text of ours anew in the current folder, some words replaced by others."""

    def write(file, name=None, **words):
        text = (manifest.ROOT / file).read_text()
        for before, after in words.items():
            assert before in text
            text = text.replace(before, after)
        (here / file).with_name(name or Path(file).name).write_text(text)

    return write


GROUPS = {"group_size: 32": "group_size: 64"}


def test_a_new_name_is_found_beside_ours(mine, said):
    mine("configs/quant/int4-g32.yaml", "mine.yaml", **GROUPS)
    mine("devices/pixel-8.yaml", "my-phone.yaml")
    assert {"mine", "int4-g32"} <= set(names("quant"))
    assert load_plan("tiny", "mine", "onnx-cpu").quant.linear.group_size == 64
    assert {"my-phone", "host"} <= set(devices.names())
    assert devices.load("my-phone").name == "my-phone"
    assert said == []


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("configs/models/tiny.yaml", lambda: load_plan("tiny", "int4-g32", "onnx-cpu")),
        ("configs/quant/int4-g32.yaml", lambda: load_plan("tiny", "int4-g32", "onnx-cpu")),
        ("configs/targets/onnx-cpu.yaml", lambda: load_plan("tiny", "int4-g32", "onnx-cpu")),
        ("configs/mixtures/diverse.yaml", lambda: load_plan("tiny", "int4-g32-gptq", "onnx-cpu")),
        ("configs/evals/default.yaml", lambda: evaluation.load("default")),
        ("configs/evals/text/wikitext2.txt", lambda: evaluation.read_text("wikitext2.txt")),
        ("configs/calibration/prose.txt", lambda: texts.read("prose.txt")),
        ("devices/host.yaml", lambda: devices.load("host")),
    ],
)
def test_one_of_our_name_is_taken_and_told_once(mine, said, file, load):
    load()
    assert said == []
    mine(file)
    for _ in range(2):
        load()
    assert said == [f"{file} of this folder is taken, not {manifest.ROOT / file}"]


def test_a_mistake_in_ones_own_names_the_file(mine):
    mine("configs/quant/int4-g32.yaml", "mine.yaml", bits="bitts")
    with pytest.raises(ExportError, match=r"^configs/quant/mine\.yaml: .*bitts: unknown key \(did you mean bits\?\)"):
        load_plan("tiny", "mine", "onnx-cpu")


def foreign(place, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **k: real(Path("/")) if self == Path() else real(self, **k))
    real_lstat = Path.lstat
    theirs = os.stat_result([0o40755, 0, 0, 0, 4712, 0, 0, 0, 0, 0])
    monkeypatch.setattr(Path, "lstat", lambda self: theirs if self.name == "configs" else real_lstat(self))


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (
            lambda place, _: (place / "manifest.json").write_text("{}"),
            "configs/ is not read here: of an artifact's folder (manifest.json) nothing decides; run in another folder",
        ),
        (
            lambda place, _: (place / "manifest.json").symlink_to("nowhere"),
            "configs/ is not read here: of an artifact's folder (manifest.json) nothing decides; run in another folder",
        ),
        (foreign, "configs/ is not read here: it belongs to another user (4712); copy it into a folder of yours"),
    ],
)
@pytest.mark.hostile("artifact", "configurations beside an artifact, and of other users", "not read, and told")
def test_what_is_not_the_users_decides_nothing(mine, here, said, monkeypatch, harm, line):
    mine("configs/quant/int4-g32.yaml", **GROUPS)
    mine("configs/quant/int4-g32.yaml", "mine.yaml")
    harm(here, monkeypatch)
    assert load_plan("tiny", "int4-g32", "onnx-cpu").quant.linear.group_size == 32
    assert "mine" not in names("quant")
    assert said == [line]


def test_the_checkouts_own_folder_and_others_are_no_users(monkeypatch, tmp_path, said):
    monkeypatch.chdir(manifest.ROOT)
    assert errors.own_folder(CONFIGS / "quant") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    assert errors.own_folder(CONFIGS / "quant") is None
    assert said == []


def test_an_artifact_is_of_contents_not_of_names(mine, tiny):
    folder, ours = tiny("onnx-cpu"), load_plan("tiny", "int4-g32", "onnx-cpu")
    before = proof.plan_key(manifest.read(folder), evaluation.load("default"))
    assert skip.reasons(ours, None, folder) == []
    mine("configs/quant/int4-g32.yaml", **GROUPS)
    mine("configs/evals/text/wikitext2.txt", **{" the ": " The "})
    own = load_plan("tiny", "int4-g32", "onnx-cpu")
    assert own.id == ours.id
    assert skip.reasons(own, None, folder) == ["quant.linear.group_size: 64, was 32"]
    assert proof.plan_key(manifest.read(folder), evaluation.load("default")).evaluation != before.evaluation


def test_a_text_of_ones_own_is_another_text(mine):
    mixture = load_named(QuantRecipe, "quant", "int4-g32-gptq").calibration
    before = texts.sha256(mixture)
    mine("configs/calibration/prose.txt", **{" the ": " The "})
    changed = {name for name, digest in texts.sha256(mixture).items() if digest != before[name]}
    assert changed == {"prose.txt"}


def test_ones_own_limits_judge_and_the_record_says_so(mine, artifact, setting, in_process):
    mine("configs/quant/int4-g32.yaml", **{"max_mean_kl: 1.0": "max_mean_kl: 0.001"})
    mine("configs/evals/text/wikitext2.txt")
    described = manifest.read(artifact)
    record = validate.validate(artifact, described, setting)
    assert failed(record) == {"quantization: mean KL"}
    files = "configs/evals/text/wikitext2.txt, configs/quant/int4-g32.yaml"
    assert record.notes[-1] == f"judged with {files} of the folder where it was validated, not of the checkout"
    given = limits.of(described, None)
    assert "quant" not in validate.validate(artifact, described, replace(setting, limits=given)).notes[-1]


@pytest.mark.parametrize("file", ["configs/models/tiny.yaml", "configs/quant/int4-g32.yaml"])
def test_golden_tokens_are_of_our_models_and_recipes(mine, artifact, file):
    described = manifest.read(artifact)
    assert tokens.golden_of(described)
    mine(file)
    assert tokens.golden_of(described) is None


def test_a_runner_of_ones_own_lies_in_ones_own_folder(mine, here):
    mine("devices/pixel-8.yaml", "my-phone.yaml", **{"threads: 4": "threads: 4\nrunner: out/runner"})
    device = devices.load("my-phone")
    with pytest.raises(ExportError, match=r"^devices/my-phone\.yaml: runner: no file out/runner; build it first"):
        device_runner.file_of_own_runner(device)
    (here / "out").mkdir()
    (here / "out/runner").touch()
    assert device_runner.file_of_own_runner(device).samefile(here / "out/runner")


def test_children_work_in_the_users_folder_and_import_nothing_of_it(here, monkeypatch):
    for name in ("export", "devices", "runtime_tests", "numpy"):
        (here / f"{name}.py").write_text("raise SystemExit('of the user')")
    ended = isolation.run(jobs.BandwidthJob(threads=1), limit_s=100)
    assert ended.result["bytes_per_s"] > 0, ended
    told = "import json, os; print(json.dumps({'result': {'cwd': os.getcwd()}}))"
    monkeypatch.setattr(isolation, "WORKER", (sys.executable, "-c", told))
    assert isolation.run(jobs.BandwidthJob(threads=1), limit_s=100).result == {"cwd": str(here)}
