"""What a change of our own code or of a checkpoint makes invalid, and what it does not."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from export import checkpoints, manifest, quantization
from export.build import skip
from export.checkpoints.origin import parse_origin
from export.host import digests
from export.pipeline import export
from export.plan import load_plan
from runtime_tests import reference
from runtime_tests.checks import weights as proof
from runtime_tests.tasks import run
from tests.support import shape
from tests.support.checkpoints import write_folder

# ── rooms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_room_that_is_not_there_is_an_error():
    with pytest.raises(FileNotFoundError):
        digests.room_digest("checkpoint")


def test_what_decides_an_artifact_imports_nothing_of_the_toolbox():
    taken = {(one.importer, one.module) for one in shape.imports() if one.module.startswith("export.toolbox")}
    outside = {pair for pair in taken if pair[0].startswith("export.") and not pair[0].startswith("export.toolbox")}
    assert outside == {("export.__main__", "export.toolbox.commands")}  # the door to them


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("onnx", reason="onnx is not installed")
    out = tmp_path_factory.mktemp("built") / "tiny"
    export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, out)
    return out


@pytest.fixture
def keys(built, tmp_path, monkeypatch):
    """The keys of everything that is cached, and why the artifact would be built again, by a copy of the code."""
    copy = shutil.copytree(digests.EXPORT, tmp_path / "export", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(digests, "EXPORT", copy)
    plan, described = load_plan("tiny", "int4-g32", "onnx-cpu"), manifest.read(built)
    opened, tokens = checkpoints.load(plan.model, None), np.zeros((1, 2), np.int64)
    asked = run.TaskOptions(("tiny",), None, True, True, None, 1, 1.0)

    def keys(edited=None):
        if edited is not None:
            with (copy / edited).open("a") as file:
                file.write("\n# another version\n")
        kinds = ("huggingface", "fp32", "quantized", "noise")
        return {
            "store": quantization.content_key(opened, plan.quant, None),
            **{kind: reference.locate(kind, described, tokens, tmp_path).name for kind in kinds},
            "artifact": skip.reasons(plan, None, built),
        } | ({"tasks": run.reference_key(described, asked)} if TASKS else {})

    return keys


TASKS = run.importlib.util.find_spec("lm_eval") is not None


@pytest.mark.parametrize("edited", ["toolbox/difference.py", "toolbox/cost.py", "toolbox/new.py"])
def test_editing_a_tool_makes_nothing_again(keys, edited):
    before = keys()
    assert before["artifact"] == []
    assert keys(edited) == before


@pytest.mark.parametrize(
    "edited",
    ["checkpoints/folder.py", "checkpoints/__init__.py", "checkpoints/tokenizer.py", "checkpoints/chat_template.py",
     "checkpoints/integers.py", "quantization/nearest.py", "quantization/gptq.py", "model.py", "checkpoints/new.py"],
)  # fmt: skip
def test_editing_what_reads_or_quantizes_makes_everything_again(keys, edited):
    before, after = keys(), keys(edited)
    assert [name for name in before if after[name] == before[name]] == []
    assert after["artifact"][0].startswith("export/: changed since commit")


@pytest.mark.parametrize("edited", ["formats/onnx_kv/graph.py", "card.md.j2", "pipeline.py"])
def test_editing_a_lowering_makes_the_artifact_again_but_no_integers(keys, edited):
    before, after = keys(), keys(edited)
    assert [name for name in before if after[name] != before[name]] == ["artifact"]


def test_code_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        digests.code_digest(tmp_path / "renamed.py")


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """Names of the files that were really read, with an empty memo."""
    names, real = [], digests.sha256
    monkeypatch.setattr(digests, "sha256", lambda path: names.append(path.name) or real(path))
    monkeypatch.setattr(digests, "MEMO", tmp_path / "memo")
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    return names


def test_a_file_is_hashed_again_only_when_it_changed(hashed, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert digests.remembered_sha256(path) == digests.remembered_sha256(path)
    assert hashed == ["weights"]
    before = digests.remembered_sha256(path)
    path.write_bytes(b"two")
    assert digests.remembered_sha256(path) != before
    assert hashed == ["weights"] * 2
    for note in (tmp_path / "memo").iterdir():
        note.write_text('"cut o')
    digests.remembered_sha256(path)
    assert hashed == ["weights"] * 3


def test_a_file_that_may_change_within_a_tick_is_not_remembered(hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_NS", 10**12)
    (tmp_path / "weights").write_bytes(b"one")
    digests.remembered_sha256(tmp_path / "weights")
    digests.remembered_sha256(tmp_path / "weights")
    assert hashed == ["weights"] * 2


def test_a_build_and_its_proof_hash_a_checkpoint_once(hashed, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    source = write_folder(tmp_path / "model")
    origin, plan = parse_origin(str(source)), load_plan("llama", "int4-g32", "onnx-cpu")
    described = export(plan, origin, tmp_path / "out")
    proof.rebuild(described, None, tmp_path / "cache")
    assert skip.reasons(plan, origin, tmp_path / "out") == []
    assert hashed.count("model.safetensors") == 1
    assert hashed.count("model.onnx.data") == 2  # an artifact's own files are read, or damage would not be seen


def test_tokenizer_files_are_part_of_a_checkpoint(tmp_path):
    source, model = write_folder(tmp_path / "model"), load_plan("llama", "int4-g32", "onnx-cpu").model
    recipe = load_plan("tiny", "int4-g32-gptq", "onnx-cpu").quant
    opened = checkpoints.load(model, parse_origin(str(source)))
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= opened.sha256.keys()
    (source / "special_tokens_map.json").write_text("{}")
    again = checkpoints.load(model, parse_origin(str(source)))
    assert again.sha256.keys() - opened.sha256.keys() == {"special_tokens_map.json"}
    assert again.bits_per_weight == opened.bits_per_weight
    assert quantization.content_key(again, recipe, None) != quantization.content_key(opened, recipe, None)


def test_origin_and_digests_import_no_torch():
    code = "import sys, export.checkpoints.origin, export.host.digests; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
