"""`python -m export verify`: every way an artifact can be wrong is one line; a whole one has none."""

import hashlib
import json
import os
import shutil
import sys

import coremltools.proto.MIL_pb2 as mil
import numpy as np
import onnx
import pytest
from coremltools.proto import Model_pb2

from export import formats, manifest
from export.errors import ExportError
from export.formats import StoredWeight
from export.manifest import LayerInfo
from export.toolbox import model_checks, verification
from tests.support.artifacts import COMPANIONS, add_companions, edit_manifest, reseal
from tests.support.reliability import MOVED_ARTIFACT

FORMATS = ("onnx-cpu", "executorch-xnnpack", "coreml")
PACKAGE = "model.mlpackage"
MODEL = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(params=FORMATS)
def folder(request, tiny, tmp_path):
    """A copy to break, of every format."""
    return shutil.copytree(tiny(request.param), tmp_path / "artifact")


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy to break, of one format."""
    return lambda name: shutil.copytree(tiny(name), tmp_path / "artifact")


@pytest.fixture
def here(monkeypatch):
    """The model is read in this process: no import of the libraries for every case."""
    monkeypatch.setattr(verification, "in_child", lambda folder, limit_s: model_checks.check(folder))


@pytest.fixture
def no_child(monkeypatch):
    """Findings of files and manifest only."""
    monkeypatch.setattr(verification, "in_child", lambda folder, limit_s: [])


@pytest.fixture
def command(export_command):
    """Exit code, lines of stdout, stderr."""

    def run(*arguments):
        code, out, err = export_command("verify", *arguments)
        return code, out.splitlines(), err

    return run


def found(folder):
    findings = verification.verify(folder, 100)
    assert all("\n" not in finding for finding in findings)
    return findings


def only(findings, words):
    assert len(findings) == 1, findings
    assert words in findings[0]


def test_a_whole_artifact_passes(folder, here):
    assert found(folder) == []


def test_the_model_is_read_in_a_process_of_its_own(command, copy):
    folder = copy("executorch-xnnpack")
    code, out, _ = command(folder)
    assert code == 0, out
    assert out == [f"{folder}: as its manifest says"]


def test_wrong_usage_is_another_exit_code(command, folder):
    assert command(folder / "tokenizer.json")[0] == 2
    assert command(folder, "--limit", "0")[0] == 2
    assert command()[0] == 2


def test_each_changed_or_cut_file_is_named(folder, no_child, command):
    for name in manifest.read(folder).files:
        path, data = folder / name, (folder / name).read_bytes()
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        only(found(folder), f"{name}: differs from manifest.json (sha256)")
        path.write_bytes(data[:-1])
        only(found(folder), f"{name}: {len(data) - 1} bytes, manifest.json says {len(data)}")
        path.unlink()
        code, out, _ = command(folder)
        assert (code, out) == (1, [f"{path}: missing; build the artifact again"])
        path.write_bytes(data)
    assert found(folder) == []


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
PULL = "is a Git LFS pointer, not the file; run `git lfs pull` in the clone that it is from"


def test_pointers_are_told_by_everything_that_opens_an_artifact(folder, no_child, export_command):
    for name in ("tokenizer.json", manifest.FILE):
        (folder / name).write_bytes(POINTER)
        assert found(folder) == [f"{folder / name}: {PULL}"]
        for command in (["inspect", folder], ["diff", folder, folder]):
            assert export_command(*command) == (1, "", f"error: {folder / name}: {PULL}\n"), command


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_other_line_ends_are_told(folder, no_child, name):
    path = folder / name
    assert b"\n" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    only(found(folder), f"{name}: its line ends were changed, as git's core.autocrlf does; clone or copy it without")


def test_a_file_beside_them_is_named(copy, no_child):
    folder = copy("coreml")
    (folder / PACKAGE / "Data" / "more").write_bytes(b"x")
    only(found(folder), "more: not listed in manifest.json")


@pytest.mark.reliability("finished model files cut short and sealed again", "found by structure")
@pytest.mark.parametrize("size", [0, 1, 100, 5_000, -2])
def test_a_cut_model_that_was_sealed_again_is_still_found(folder, here, size):
    """Structure, without the help of hashes."""
    artifact = folder / manifest.read(folder).plan.target.artifact
    for path in sorted(artifact.rglob("*")) or [artifact, *folder.glob("*.data")]:
        if path.is_file() and len(whole := path.read_bytes()) > size:
            path.write_bytes(whole[:size])
            reseal(folder)
            assert found(folder), path
            path.write_bytes(whole)


@pytest.mark.reliability("manifest.json that is none", "one line")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b'{"a": ' * 100_000])
def test_a_manifest_that_is_none(copy, content):
    folder = copy("onnx-cpu")
    (folder / manifest.FILE).write_bytes(content)
    only(found(folder), "manifest.json: damaged or of another version")


def layer(fields, index, **changes):
    fields["quantization"]["layers"][index].update(changes)


@pytest.mark.reliability("manifest.json: contradictions and names that lead outside", "named")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update(id="another"), "id is 'another'"),
        (lambda f: f["contract"]["kv"].update(layers=3), "contract.kv.layers is 3, expected 2"),
        (lambda f: f["contract"]["kv"].update(context_length=512), "contract.kv.context_length is 512"),
        (lambda f: f["plan"]["target"].update(artifact="tokenizer.model"), "do not hold 'tokenizer.model'"),
        (lambda f: layer(f, 1, bits=8), "q_proj.weight: int8 in groups of 32 is not a scheme of the recipe"),
        (lambda f: layer(f, 2, group_size=64), "k_proj.weight: int4 in groups of 64 is not a scheme of the recipe"),
        (lambda f: f["quantization"]["layers"].pop(3), "v_proj.weight: missing"),
        (lambda f: layer(f, 0, name="model.norm.weight"), "model.norm.weight: not quantized by the recipe"),
        (lambda f: f.update(mood="good"), "mood: unknown key"),
        (lambda f: f["files"].update({"../x": f["files"]["model.onnx"]}), "file '../x' climbs out with `..`"),
        (lambda f: f["files"].update({"/etc/passwd": f["files"]["model.onnx"]}), "file '/etc/passwd' is absolute"),
        (lambda f: f["files"].update({"a\\..\\..\\x": f["files"]["model.onnx"]}), "climbs out"),
        (lambda f: f["files"].update({"C:\\x": f["files"]["model.onnx"]}), "is absolute"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_leads_outside(copy, no_child, change, words):
    folder = copy("onnx-cpu")
    edit_manifest(folder, change)
    assert [finding for finding in found(folder) if words in finding], found(folder)


@MOVED_ARTIFACT
@pytest.mark.reliability("what hubs, git, file managers and editors put beside an artifact", "left aside")
def test_companions_are_left_aside_and_everything_a_runtime_reads_is_not(copy, no_child, record_property):
    folder = copy("coreml")
    add_companions(folder)
    (folder / PACKAGE / ".DS_Store").write_text("x")
    assert found(folder) == []
    manifest.verify_files(folder, manifest.read(folder))
    for name in (
        "special_tokens_map.json",
        "vocab.bpe",
        "libcustom.so",
        "__init__.py",
        f"{PACKAGE}/more.bin",
    ):
        (folder / name).write_text("{}")
        only(found(folder), f"{name}: not listed in manifest.json; remove it or build again")
        (folder / name).unlink()
    record_property("cases", len(COMPANIONS) + 1)


def snapshot(folder, place):
    """The folder as a hub's cache holds it: links into blobs."""
    blobs = place / "blobs"
    blobs.mkdir()
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(blob)
    return folder


@MOVED_ARTIFACT
@pytest.mark.reliability("an artifact opened where all its files are links", "the same line from every command")
def test_a_hub_snapshot_is_refused_alike_by_everything_that_opens_an_artifact(
    folder, no_child, export_command, tmp_path
):
    first = min(path for path in folder.iterdir() if path.is_file())
    line = (
        f"{first}: a link; an artifact holds files only; copy it with `cp -rL`, or download with "
        "`hf download --local-dir`"
    )
    snapshot(folder, tmp_path)
    assert found(folder)[0] == line
    for command in (["inspect", folder], ["diff", folder, folder]):
        assert export_command(*command) == (1, "", f"error: {line}\n"), command
    with pytest.raises(ExportError, match="a link; an artifact holds files only"):
        manifest.verify_files(folder, manifest.read(folder))  # of chat, tasks and validation


@MOVED_ARTIFACT
def test_a_folder_that_is_a_link_is_the_folder_it_names(folder, no_child, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert found(tmp_path / "link") == []


@pytest.mark.reliability("links and pipes in an artifact folder", "refused before anything is read")
def test_links_and_pipes_are_refused_before_anything_is_read(copy, no_child, tmp_path):
    folder = copy("onnx-cpu")
    (folder / "model.onnx.data").rename(tmp_path / "elsewhere")
    (folder / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    only(found(folder), "model.onnx.data: a link")
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "model.onnx.data")
    only(found(folder), "model.onnx.data: neither a file nor a folder")
    (folder / manifest.FILE).unlink()
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / manifest.FILE)
    only(found(folder), "manifest.json: neither a file nor a folder")


@pytest.mark.reliability("ONNX external data and genai_config.json that lead outside", "named, not opened")
@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../secret", "climbs out with `..`"),
        ("/etc/passwd", "is absolute"),
        ("a/../../b", "climbs out"),
        ("", "is no file name"),
    ],
)
def test_external_data_that_leads_outside(copy, here, location, words):
    folder = copy("onnx-cpu")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(one for one in model.graph.initializer if one.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)
    only(found(folder), f"{tensor.name}: external data {location!r} {words}")


@pytest.mark.reliability("ONNX external data and genai_config.json that lead outside", "named, not opened")
def test_external_data_of_a_tensor_inside_a_node(copy, here):
    folder = copy("onnx-cpu")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = onnx.helper.make_tensor("hidden", onnx.TensorProto.FLOAT, [1], bytes(4), raw=True)
    onnx.external_data_helper.set_external_data(tensor, "../x", offset=0, length=4)
    tensor.ClearField("raw_data")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", inner))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)
    only(found(folder), "hidden: external data '../x' climbs out")


@pytest.mark.reliability("ONNX external data and genai_config.json that lead outside", "named, not opened")
def test_a_genai_config_that_leads_outside(copy, here):
    folder = copy("onnx-cpu")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "../model.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))
    reseal(folder)
    only(found(folder), "genai_config.json: filename '../model.onnx' climbs out")


@pytest.mark.reliability("Core ML items and weight files that lead outside", "named, not opened")
@pytest.mark.parametrize("path", ["../../../etc/passwd", "/etc/passwd", "com.apple.CoreML/../../x"])
def test_a_core_ml_item_that_leads_outside(copy, here, path):
    folder = copy("coreml")
    listed = json.loads((folder / PACKAGE / "Manifest.json").read_text())
    for key, entry in listed["itemInfoEntries"].items():
        if key != listed["rootModelIdentifier"]:
            entry["path"] = path
    (folder / PACKAGE / "Manifest.json").write_text(json.dumps(listed))
    reseal(folder)
    only(found(folder), f"Manifest.json: item {path!r}")
    listed["itemInfoEntries"][listed["rootModelIdentifier"]]["path"] = path
    (folder / PACKAGE / "Manifest.json").write_text(json.dumps(listed))
    reseal(folder)
    assert len(found(folder)) == 2


def weight_file(folder):
    """The package's spec and its constants that lie in weight.bin."""
    spec = Model_pb2.Model()
    spec.ParseFromString((folder / MODEL).read_bytes())
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    return spec, block.operations


@pytest.mark.reliability("Core ML items and weight files that lead outside", "named, not opened")
def test_a_core_ml_weight_file_that_leads_outside(copy, here):
    folder = copy("coreml")
    spec, operations = weight_file(folder)
    table = next(op for op in operations if op.outputs and op.outputs[0].name == "cos_table")
    table.attributes["val"].blobFileValue.fileName = "@model_path/../../../../x"
    (folder / MODEL).write_bytes(spec.SerializeToString())
    reseal(folder)
    only(found(folder), "weight file '@model_path/../../../../x' climbs out")


def test_a_core_ml_constant_that_is_not_where_the_program_says(copy, here):
    folder = copy("coreml")
    spec, operations = weight_file(folder)
    table = next(op for op in operations if op.outputs and op.outputs[0].name == "cos_table")
    table.attributes["val"].blobFileValue.offset += 64
    (folder / MODEL).write_bytes(spec.SerializeToString())
    reseal(folder)
    only(found(folder), "cos_table: no constant at offset 128")
    assert table.attributes["val"].type.tensorType.dataType == mil.FLOAT16


def scales_in(folder, name):
    """The stored scales of one weight, writable, whatever the format: found by their bytes."""
    described = manifest.read(folder)
    reader = formats.reader(described.plan.target.backend)
    file = folder / described.plan.target.artifact
    stored = next(weight for weight in reader.read_weights(file, described.architecture) if weight.name == name)
    brain = (np.ascontiguousarray(stored.scale).view(np.uint32) >> 16).astype(np.uint16)
    half = stored.scale.astype(np.float16).view(np.uint16)
    for path in (file, folder / "model.onnx.data", folder / WEIGHTS):
        data = np.memmap(path, np.uint8, "r+") if path.is_file() else np.zeros(0, np.uint8)
        for wanted in (brain, half):
            at = bytes(data).find(wanted.tobytes())
            if at >= 0:
                return data[at : at + wanted.nbytes].view(np.uint16)
    raise AssertionError(f"{name}: not found")


@pytest.mark.parametrize(("bits", "words"), [(0x8000, "positive"), (0x7F80, "positive")])
def test_a_wrong_scale_is_found_even_when_sealed_again(folder, here, bits, words):
    """Negative; infinite or not a number."""
    name = "model.layers.1.mlp.down_proj.weight"
    stored = scales_in(folder, name)
    stored[3] |= bits
    del stored
    reseal(folder)
    only(found(folder), f"{name}: 1 scales that are not {words} numbers")


def test_swapped_scales_are_found_by_the_hash(folder, no_child):
    stored = scales_in(folder, "model.layers.1.mlp.down_proj.weight")
    other = int(np.flatnonzero(stored != stored[0])[0])
    stored[[0, other]] = stored[[other, 0]]
    del stored
    only(found(folder), "(sha256)")


def weight(change=None):
    q, scale = np.full((4, 64), 7, np.int8), np.full((4, 2), 0.5, np.float32)
    if change:
        change(q, scale)
    return StoredWeight("w", q, scale)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, None),
        (lambda q, s: q.__setitem__((0, 0), 8), "1 integers outside -8…7"),
        (lambda q, s: q.__setitem__((slice(None), 0), -9), "4 integers outside -8…7"),
        (lambda q, s: s.__setitem__((0, 0), 0), "1 scales that are not positive numbers"),
        (lambda q, s: s.__setitem__((0, 1), np.nan), "1 scales that are not positive numbers"),
        (lambda q, s: s.__setitem__((0, 1), 0.1), "1 scales that are no bfloat16"),
    ],
)
def test_numbers_that_the_scheme_does_not_have(change, words):
    one = LayerInfo(name="w", bits=4, group_size=32, sqnr_db=1, max_abs_error=1, kept=False, not_kept=None)
    got = model_checks.wrong_numbers(weight(change), one, (4, 64), common=True)
    assert got == words


def test_shapes_that_the_manifest_does_not_have():
    one = LayerInfo(name="w", bits=4, group_size=64, sqnr_db=1, max_abs_error=1, kept=False, not_kept=None)
    assert "scales of shape (4, 2), expected (4, 1)" in model_checks.wrong_numbers(weight(), one, (4, 64), common=True)
    assert "integers of shape (4, 64)" in model_checks.wrong_numbers(weight(), one, (8, 64), common=True)


def test_another_models_file_under_this_manifest(tiny, copy, here):
    """Whole, sealed, and not what the manifest describes."""
    folder = copy("onnx-cpu")
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(tiny("onnx-cpu", "int4-g64") / name, folder / name)
    reseal(folder)
    findings = found(folder)
    assert "model.layers.0.self_attn.q_proj.weight: int4 g64 in the file, int4 g32 in the manifest" in findings
    assert [finding for finding in findings if "scales of shape" in finding]


def test_another_interface_under_this_manifest(folder, here):
    described = manifest.read(folder)
    contract = described.contract
    first = contract.inputs[0].model_copy(update={"dtype": "float64"})
    manifest.write(folder, described.model_copy(
        update={"contract": contract.model_copy(update={"inputs": (first, *contract.inputs[1:])})}))  # fmt: skip
    only(found(folder), f"input {first.name}: {contract.inputs[0].dtype} in the file")
    manifest.write(folder, described.model_copy(
        update={"contract": contract.model_copy(update={"inputs": contract.inputs[1:]})}))  # fmt: skip
    only(found(folder), f"inputs: the file has {len(contract.inputs)}")


def test_a_program_with_a_flipped_structure_never_ends_verify(copy, command):
    """Native code reads it in the child; whatever happens there, the answer is lines."""
    folder = copy("executorch-xnnpack")
    data = bytearray((folder / "model.pte").read_bytes())
    data[1000:1400] = b"\xff" * 400  # the flatbuffer stands first
    (folder / "model.pte").write_bytes(data)
    reseal(folder)
    code, out, _ = command(folder)
    assert code == 1
    assert out


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import time; time.sleep(60)", "not be read within 1 s"),
        ("raise SystemExit(3)", "exit 3: no message"),
        ("print('hello')", "exit 0"),
        ("import sys; sys.exit('out of luck')", "exit 1: out of luck"),
    ],
)
def test_how_a_child_can_end(copy, monkeypatch, program, words):
    monkeypatch.setattr(verification, "WORKER", (sys.executable, "-c", program))
    only(verification.verify(copy("onnx-cpu"), 1.0 if "sleep" in program else 60.0), words)
