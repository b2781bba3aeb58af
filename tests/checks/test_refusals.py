"""`python -m runtime_tests` on a wrong folder, a damaged artifact, a lost checkpoint: one line, cause and remedy."""

import json
import os

import pytest

import devices
from export import manifest, pipeline
from export.checkpoints import whereabouts
from export.checkpoints.origin import parse_origin
from export.plan import Plan, QuantRecipe, load_named, load_plan
from runtime_tests import __main__ as cli
from runtime_tests import evaluation
from runtime_tests.checks.limits import Limits
from runtime_tests.evidence import record
from tests.support.artifacts import TARGET, edit_manifest, reseal
from tests.support.checkpoints import LLAMA, write_folder

REAL_DEVICE = devices.load
REAL_EVALUATION = evaluation.load


@pytest.fixture
def records(tmp_path):
    """The records of the newest run."""
    return lambda: record.newest_run(tmp_path / "build/records/records.jsonl", "host")


@pytest.fixture
def check(command, in_process, capsys):
    """Runs the command; its exit code, its error lines on stderr, and its table."""

    def run(*arguments):
        code = command(*arguments)
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert "Traceback" not in err
        return code, "\n".join(errors), out

    return run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fields: fields.update(schema_version=2), "damaged or of another version: schema_version"),
        (lambda fields: fields.pop("contract"), "contract: missing; build the artifact again"),
        (lambda fields: fields.update(mood="good"), "mood: unknown key"),
        (lambda fields: fields["plan"]["target"].update(artifact="../../x"), "plan.target.artifact"),
        (lambda fields: fields.update(id="tiny_int4-g32_onnx-cpu"), "its plan is 'tiny_int4-g32_fake'"),
        (lambda fields: fields["architecture"].update(num_hidden_layers=10**9), "architecture.num_hidden_layers"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_before_any_work(check, artifact, tmp_path, change, words):
    edit_manifest(artifact, change)
    code, error, _ = check(artifact)
    assert code == 1
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "build" / "records").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b'{"a": ' * 100_000])
def test_a_manifest_that_is_none(check, artifact, content):
    (artifact / manifest.FILE).write_bytes(content)
    code, error, _ = check(artifact)
    assert (code, error.count("\n")) == (1, 0)
    assert "manifest.json: damaged or of another version" in error


def test_a_target_that_the_device_does_not_run(check, artifact):
    def change(fields):
        fields["plan"]["target"]["name"] = "tflite"
        fields["id"] = "tiny_int4-g32_tflite"

    edit_manifest(artifact, change)
    code, error, _ = check(artifact)
    assert (code, error.count("\n")) == (1, 0)
    assert "does not run tflite; it runs fake" in error


def renamed_part(kind, name):
    def change(fields):
        fields["plan"][kind]["name"] = name
        fields["id"] = "_".join(fields["plan"][part]["name"] for part in ("model", "quant", "target"))

    return change


@pytest.mark.hostile(
    "artifact", "pass marks, golden answers and recipes of its own", "judged by this checkout, and noted"
)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed_part("quant", "int5-g32"), "tiny_int5-g32_fake: this checkout has no configs/quant/int5-g32.yaml"),
        (lambda f: f["plan"]["target"].update(activations="int8-per-token"), "(activations differs): build it again"),
        (lambda f: f["plan"]["target"].update(session="pte", backend="pte"), "(backend, session differs): build it"),
        (lambda f: f["plan"]["target"].update(artifact="tokenizer.json"), "(artifact differs): build it again"),
    ],
)
def test_what_this_checkout_does_not_know_is_not_judged(check, artifact, tmp_path, change, words):
    edit_manifest(artifact, change)
    code, error, _ = check(artifact)
    assert (code, error.count("\n")) == (1, 0)
    assert words in error
    assert error.endswith("--limits FILE")
    assert not (tmp_path / "build" / "records").exists()


def write_limits(path, **target):
    fields = {"quant": {"max_mean_kl": 1.0, "min_top1": 0.4}, "target": {**TARGET.limits.model_dump(), **target}}
    path.write_text(json.dumps(fields))
    return path


def test_limits_that_are_given_judge(check, artifact, tmp_path, records):
    edit_manifest(artifact, renamed_part("quant", "int5-g32"))
    code, _, out = check("--limits", write_limits(tmp_path / "limits.json"), artifact)
    assert (code, records()[-1].outcome) == (0, "pass"), out
    code, _, out = check("--limits", write_limits(tmp_path / "limits.json", min_sqnr_db=1e9), artifact)
    assert code == 1
    assert "(at least 1,000,000,000)" in out
    assert "target.min_sqnr_db 1000000000.0 (its own: 40.0)" in records()[-1].notes[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quant: {max_mean_kl: 1.0, min_top1: 0.4}", "target: missing"),
        ("[]", "expected `key: value` lines, found list"),
        ("{", "not readable as YAML"),
        ("mood: good", "mood: unknown key"),
    ],
)
def test_limits_that_are_none(check, artifact, tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    code, error, _ = check("--limits", tmp_path / "mine.yaml", artifact)
    assert code == 1
    assert "mine.yaml: " in error
    assert words in error


@pytest.mark.hostile("record", "limits that are a pipe or have no end", "one line")
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (os.mkfifo, "a pipe, no file; give a YAML file"),
        (lambda path: path.touch() or os.truncate(path, 2**40), "larger than 1048576 bytes, which no YAML of ours is"),
    ],
)
def test_limits_without_an_end(check, artifact, tmp_path, make, line):
    make(tmp_path / "mine.yaml")
    code, error, _ = check("--limits", tmp_path / "mine.yaml", artifact)
    assert (code, error.splitlines()[-1]) == (1, f"error: {tmp_path}/mine.yaml: {line}")


def test_limits_do_not_go_with_tasks(check, artifact, tmp_path):
    code, error, _ = check("--tasks", "x", "--limits", write_limits(tmp_path / "limits.json"), artifact)
    assert code == 2
    assert "--limits judges a validation; scores of --tasks are not judged" in error


def test_a_folder_that_is_no_artifact(check, tmp_path):
    code, error, _ = check(tmp_path)
    assert code == 1
    assert "manifest.json: missing; give an artifact folder made by" in error


def test_one_wrong_folder_stops_the_run_before_any_work(check, built, tmp_path):
    code, error, out = check(built, tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert "nowhere/manifest.json: missing" in error


def test_an_unknown_device_is_answered_by_the_nearest(check, built, monkeypatch):
    monkeypatch.setattr(cli.devices, "load", REAL_DEVICE)
    code, error, _ = check("--device", "pixel-99", built)
    assert code == 1
    assert "unknown device 'pixel-99'; did you mean pixel-8?" in error


def test_an_unknown_evaluation_lists_the_known_ones(check, built, monkeypatch):
    monkeypatch.setattr("runtime_tests.evaluation.load", REAL_EVALUATION)
    code, error, _ = check("--eval", "mmlu", built)
    assert code == 1
    assert "unknown name 'mmlu' in configs/evals; known: default" in error


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors: differs from manifest.json (sha256)"),
        (lambda folder: flip(folder / "tokenizer.json"), "tokenizer.json: differs from manifest.json (sha256)"),
        (lambda folder: (folder / "model.fault").unlink(), "model.fault: missing; build the artifact again"),
        (lambda folder: (folder / "new.bin").write_bytes(b"x"), "new.bin: not listed in manifest.json; remove it"),
    ],
)
def test_a_file_that_is_not_as_built_is_named(check, artifact, damage, words):
    damage(artifact)
    code, error, out = check(artifact)
    assert (code, error) == (1, "")
    assert [line for line in out.splitlines() if words in line]
    assert "damaged" in out


def flip(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def from_folder(tmp_path, store, monkeypatch):
    """An artifact whose checkpoint is a folder, and no other test's folder of the same bytes."""
    monkeypatch.setattr(whereabouts, "FOLDER", tmp_path / "origins")
    plan = Plan(model=LLAMA, quant=load_named(QuantRecipe, "quant", "int4-g32"), target=TARGET)
    source = write_folder(tmp_path / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "CACHE", store)
        pipeline.export(plan, parse_origin(str(source)), tmp_path / "from-folder")
    return tmp_path / "from-folder", source


def verdict(out):
    """The line that says why a run ended."""
    lines = [line for line in out.splitlines() if line.startswith("llama_int4-g32_fake: ")]
    assert len(lines) == 1, out
    return lines[0]


def test_a_checkpoint_that_is_gone_is_named_and_can_be_given(check, from_folder, tmp_path):
    folder, source = from_folder
    moved = source.rename(tmp_path / "moved")
    code, _, out = check(folder)
    assert code == 1
    assert f"{source}: not found on this machine; give where it is now with --source SOURCE" in verdict(out)
    code, _, out = check("--source", moved, folder)
    assert "no such file" not in out
    assert code == 0, out


def test_a_checkpoint_that_changed_since_the_build_is_named(check, from_folder):
    folder, source = from_folder
    flip(source / "model.safetensors", -1)  # the last weight's sign or exponent
    code, _, out = check(folder)
    assert code == 1
    line = f"{source}/model.safetensors: changed: not the checkpoint that llama_int4-g32_fake was built from; build it"
    assert line in verdict(out)


def test_a_tokenizer_that_changed_since_the_build_is_named(check, from_folder):
    folder, source = from_folder
    (source / "chat_template.jinja").write_text("{{ messages }}")
    code, _, out = check(folder)
    assert code == 1
    assert "tokenizer: differences" in verdict(out)


def test_a_resealed_copy_of_another_plan_is_not_excused(check, artifact):
    """A file of another model under a fresh manifest: whole, and still refused."""
    flip(artifact / "model.safetensors")
    reseal(artifact)
    code, _, out = check(artifact)
    assert code == 1
    assert "fail" in out


@pytest.mark.parametrize("abi", ["aarch64", "arm64", "arm64-v8a"])
def test_one_processor_has_one_limit_whatever_its_system_calls_it(abi):
    """macOS and Android have names of their own for it."""
    plan = load_plan("tiny", "int4-g32", "onnx-cpu")
    target = plan.target
    known = Limits(quant=plan.quant.limits, target=target.limits, target_on=target.limits_on)
    assert known.on(abi) == target.limits_on["aarch64"] != target.limits
    assert known.on("x86_64") == target.limits
