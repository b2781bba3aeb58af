"""Names, YAML files and places with mistakes: one line that says which file or field, and what to do."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from export import checkpoints, manifest, plan
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host import digests
from export.plan import load_plan
from tests.support.checkpoints import LLAMA, SMALL, refusal, write_folder


def command(*arguments, cwd=manifest.ROOT, **environment):
    """The real command; gives exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "export", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(manifest.ROOT), **environment}, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "checkpoint")


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("tiny", "int4-g32"), 2, "Missing argument"),
        (("tiny", "int4-g32", "coreml", "--bits", "3"), 2, "No such option"),
        (("tiny", "int4-g32", "coreml", "--name", "../x"), 1, "--name '../x' is no name"),
        (("tiny", "int4-g32", "coreml", "coreml"), 2, "the same target twice"),
        (("tiny", "int4-g32", "coreml", "corelm"), 1, "unknown name 'corelm'"),
        (("llama", "int4-g32", "onnx-cpu"), 1, "give --source"),
        (("llama", "int4-g32", "onnx-cpu", "coreml"), 1, "give --source"),
        (("llama", "int4-g32", "onnx-cpu", "--source", "nobody/nothing"), 1, "--source"),
    ],
)
def test_the_command_ends_in_one_line_and_leaves_nothing(tmp_path, arguments, code, words):
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    returned, lines = command(*arguments, cwd=tmp_path, **unreachable)
    errors = [line for line in lines if line.startswith("error:")]
    assert (returned, len(errors)) == (code, 1)
    assert words in errors[0]
    left = [path.name for path in tmp_path.glob("build/*") if not path.name.endswith(".lock")]
    assert left == []


def test_a_hub_that_cannot_be_reached_or_must_not_be(monkeypatch, tmp_path):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert "give a local folder with --source" in refusal(LLAMA, "hub:nobody/nothing@main")
    assert "give a local folder with --source" in refusal(LLAMA, "hub:a bad name")


# ── names and YAML ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (("tiny2", "int4-g32", "coreml"), r"'tiny2' in configs/models; did you mean tiny\?"),
        (("tiny", "int4_g32", "coreml"), r"'int4_g32' in configs/quant; did you mean int4-g32 or .*\?"),
        (("tiny", "../quant/int4-g32", "coreml"), r"configs/quant; did you mean int4-g32\?"),
        (("tiny", "int4-g32", "tflite"), "'tflite' in configs/targets; known: coreml, executorch-xnnpack, onnx-cpu$"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest(names, known):
    with pytest.raises(ExportError, match=f"^unknown name .*{known}"):
        load_plan(*names)


@pytest.fixture
def configs(tmp_path, monkeypatch):
    copied = shutil.copytree(plan.CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("evals"))
    monkeypatch.setattr(plan.configs, "CONFIGS", copied)
    return copied


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("models/tiny", {"contxt": 1}, r"contxt: unknown key \(did you mean context_length\?\)"),
        ("models/tiny", {"zz": 1}, r"zz: unknown key \(known: architecture, .*, license, source\)"),
        ("models/tiny", {"license": None}, "license: Input should be a valid string"),
        ("models/tiny", {"context_length": "many"}, "context_length: Input should be a valid integer"),
        ("models/tiny", {"context_length": 8}, "context_length: .*greater than or equal to 64"),
        ("models/tiny", {"context_length": 4096}, "context_length 4096 is more than .*2048"),
        ("models/tiny", {"name": "other"}, "remove the key `name`"),
        ("models/tiny", {"architecture": {"vocab_size": 512}}, r"architecture\.hidden_size: missing"),
        ("models/tiny", {"source": "seed:x"}, "seed must be a whole number"),
        ("models/tiny", {"source": "package:nobody/x"}, "package 'nobody' is not installed"),
        ("models/tiny", {"source": "package:numpy/x"}, "reinstall the package 'numpy'"),
        ("quant/int4-g32", {"linear": {"bits": 3, "group_size": 32}}, r"linear\.bits: Input should be 4 or 8"),
        ("quant/int4-g32", {"linear": {"bits": 4, "group_size": 0}}, r"linear\.group_size: .*greater than 0"),
        ("quant/int4-g32", {"linear": {"bits": 4, "group_size": 48}}, r"layers\.0\.self_attn\.q_proj.*groups of 48"),
        ("quant/int4-g32", {"head": None}, "embedding and head are tied"),
        ("quant/int4-g32", {"method": "none"}, "method 'none' contradicts"),
        ("quant/int4-g32", {"method": "gguf"}, r"method: 'gguf' is unknown \(known: gptq, kept, none,"),
        ("quant/int4-g32", {"method": "gtpq"}, r"method: 'gtpq' is unknown \(did you mean gptq\?\)"),
        ("quant/int4-g32", {"linaer": {}}, r"linaer: unknown key \(did you mean linear"),
        ("quant/int4-g32", {"limits": {"max_kl": 1}}, r"limits\.max_kl: unknown key \(did you mean max_mean_kl\?\)"),
        (
            "quant/int4-g32",
            {"linear": {"bit": 4, "group_size": 32}},
            r"linear\.bit: unknown key \(did you mean bits\?\); linear\.bits: missing",
        ),
        ("quant/int4-g32", {"calibration": "bref"}, r"'bref' in configs/mixtures; did you mean brief\?"),
        ("targets/coreml", {"backend": "tflite"}, "unknown backend 'tflite'.*onnx_kv"),
        ("targets/coreml", {"backend": "contents"}, "unknown backend"),
        ("targets/coreml", {"artifact": "../../model.mlpackage"}, "artifact: .* is no name"),
        ("targets/coreml", {"activations": "int4"}, "activations: 'int4' is unknown .*int8-per-token"),
        ("targets/coreml", {"limits_on": {"arm64": {"min_topp": 1}}}, r"arm64\.min_topp: unknown key .*min_top1\?"),
    ],
)
def test_a_wrong_value_in_a_yaml_names_its_field(configs, tmp_path, file, changes, words):
    from export.pipeline import export

    path = configs / f"{file}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    with pytest.raises(ExportError, match=words):
        export(load_plan("tiny", "int4-g32", "coreml"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not readable as YAML"), ("- a", "found list"), ("", "found NoneType"), ("\xff", "found str"),
        ("method: rtn\nlinear: null\nmethod: rtn", "the key 'method' stands twice"),
        ("linear: {bits: 4, bits: 8}", "the key 'bits' stands twice"),
        ("layers:\n  *.down_proj: {bits: 8}", r'line 2, column 3: .* but found .\..; write "\*\.down_proj" in quotes$'),
        ("layers: {*_proj: {bits: 8}}", r'line 1, column 10: .* alias ._proj.; write "\*_proj" in quotes$'),
        ("layers:\n  model.[01]*: 1\n  [q]*: 1", r'line 3, column 6: .*; write "\[q\]\*" in quotes$'),
        ("layers:\n  {0,1}.x: 1", "line 2, column 8: .*; write text that begins with a bracket, .* in quotes"),
        ("description: int4: all", "line 1, column 18: .*; write text that holds a colon and a space in quotes$"),
        ("a:\n\tb: 1", "line 2, column 1: .*; write spaces instead of tabs$"),
        ("a: !!python/object/apply:os.system [true]", "not readable as YAML"),
    ],
)  # fmt: skip
def test_a_yaml_that_is_none(configs, text, words):
    path = configs / "quant" / "int4-g32.yaml"
    path.write_text(text)
    with pytest.raises(ExportError, match=rf"int4-g32\.yaml.*{words}"):
        load_plan("tiny", "int4-g32", "coreml")


def test_a_missing_key_in_a_yaml(configs):
    path = configs / "quant" / "int4-g32.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("limits")))
    with pytest.raises(ExportError, match="limits: missing"):
        load_plan("tiny", "int4-g32", "coreml")


def test_a_group_that_does_not_divide_is_named_before_the_checkpoint_is_opened(monkeypatch, tmp_path):
    from export.pipeline import export

    monkeypatch.setattr(checkpoints, "load", lambda *_: pytest.fail("opened"))
    with pytest.raises(
        ExportError, match=r"layers\.0\.self_attn\.q_proj\.weight has 576 input features.*groups of 128"
    ):
        export(load_plan("smollm2-135m", "int4-g128", "onnx-cpu"), None, tmp_path / "out")


def test_a_group_that_does_not_divide_is_named_before_the_weights_are_hashed(monkeypatch, tmp_path, folder):
    from export.pipeline import export

    monkeypatch.setattr(digests, "remembered_sha256", lambda path: pytest.fail("hashed"))
    with pytest.raises(ExportError, match="64 input features, which groups of 128"):
        export(load_plan("llama", "int4-g128", "onnx-cpu"), parse_origin(str(folder)), tmp_path / "out")


# ── places ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("./nowhere", "no such file or folder"),
        ("", "--source is empty"),
        ("~nobody-here/x", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("package:..", "expected package:NAME/FILE"),
        ("package:", "expected package:NAME/FILE"),
        (__file__, "not a checkpoint we read"),
        ("seed:1", "needs an architecture"),
    ],
)
def test_a_source_that_is_none(place, words):
    assert words in refusal(LLAMA, place)


def test_another_size_of_model_names_the_fields(tmp_path):
    wide = write_folder(tmp_path / "wide", SMALL.model_copy(update={"hidden_size": 96, "head_dim": 24}))
    small = LLAMA.model_copy(update={"name": "small", "architecture": SMALL})
    text = refusal(small, wide)
    assert "not the shapes of small: hidden_size 96 (expected 64), head_dim 24 (expected 16)" in text
