"""`python -m export verify`: what lies beside an artifact's files, and what leads out of its folder."""

import hashlib
import json
import os
from contextlib import contextmanager

import coremltools.proto.MIL_pb2 as mil
import onnx
import pytest
from coremltools.proto import Model_pb2

from export import manifest
from export.errors import ExportError
from export.formats import admission
from tests.support.artifacts import COMPANIONS, add_companions, found, only, reseal
from tests.support.reliability import MOVED_ARTIFACT

PACKAGE = "model.mlpackage"
MODEL = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"


@contextmanager
def changed(folder):
    """The graph, to be changed; then it is written and the folder sealed anew."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    yield model
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)


@MOVED_ARTIFACT
@pytest.mark.reliability("what hubs, git, file managers and editors put beside an artifact", "left aside")
def test_companions_are_left_aside_and_everything_a_runtime_reads_is_not(copy, no_child, record_property):
    folder = copy("coreml")
    add_companions(folder)
    (folder / PACKAGE / ".DS_Store").write_text("x")
    assert found(folder) == []
    admission.require(folder, manifest.read(folder))
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
        admission.require(folder, manifest.read(folder))  # of chat, tasks and validation


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
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b", "", "tokenizer.json"])
def test_external_data_that_leads_outside(copy, here, location):
    folder = copy("onnx-cpu")
    with changed(folder) as model:
        tensor = next(one for one in model.graph.initializer if one.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    only(found(folder), f"{tensor.name!r}: external data {location!r}, not model.onnx.data; refused")


@pytest.mark.reliability("ONNX external data and genai_config.json that lead outside", "named, not opened")
def test_external_data_of_a_tensor_inside_a_node(copy, here):
    folder = copy("onnx-cpu")
    tensor = onnx.helper.make_tensor("hidden", onnx.TensorProto.FLOAT, [1], bytes(4), raw=True)
    onnx.external_data_helper.set_external_data(tensor, "../x", offset=0, length=4)
    tensor.ClearField("raw_data")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    with changed(folder) as model:
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", inner))
    only(found(folder), f"attribute '{model.graph.node[0].name}.body' has g; refused")


@pytest.mark.reliability("ONNX external data and genai_config.json that lead outside", "named, not opened")
def test_a_genai_config_that_leads_outside(copy, here):
    folder = copy("onnx-cpu")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "../model.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))
    reseal(folder)
    words = "genai_config.json: model.decoder.filename: 'model.onnx' in a build, '../model.onnx' here; refused"
    only(found(folder), words)


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
    assert len(found(folder)) == 3


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
    only(found(folder), "weight file '@model_path/../../../../x'; refused")


def test_a_core_ml_constant_that_is_not_where_the_program_says(copy, here):
    folder = copy("coreml")
    spec, operations = weight_file(folder)
    table = next(op for op in operations if op.outputs and op.outputs[0].name == "cos_table")
    table.attributes["val"].blobFileValue.offset += 64
    (folder / MODEL).write_bytes(spec.SerializeToString())
    reseal(folder)
    only(found(folder), "cos_table: no constant at offset 128")
    assert table.attributes["val"].type.tensorType.dataType == mil.FLOAT16
