"""A stranger's folder, with the digests of its files in order: whatever opens an artifact refuses it alike.

Nothing of these folders is run, followed or overwritten; what is refused is named by file and part.
"""

import json
import os
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from coremltools.proto import Model_pb2
from flatbuffers import number_types
from flatbuffers.table import Table
from onnx import helper

from export import manifest
from export.errors import ExportError
from export.formats import admission
from export.toolbox import model_checks, verification
from runtime_tests import validate
from runtime_tests.checks.limits import Limits
from runtime_tests.evidence import baseline
from runtime_tests.evidence.record import Outcome
from runtime_tests.tasks import run as tasks
from tests.support.artifacts import edit_manifest, reseal

ONNX, PTE, COREML = "onnx-cpu", "executorch-xnnpack", "coreml"
PACKAGE = "model.mlpackage"
MODEL = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"


def added(name, text="x"):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        reseal(folder)

    return change


def beside(name, make=Path.touch):
    """Without a word of it in the manifest."""

    def change(folder):
        (folder / name).parent.mkdir()
        make(folder / name)

    return change


def genai(change):
    def edit(folder):
        path = folder / "genai_config.json"
        config = json.loads(path.read_text())
        change(config["model"]["decoder"])
        path.write_text(json.dumps(config, indent=1) + "\n")
        reseal(folder)

    return edit


def twice(folder):
    """A key given twice: parsers choose differently."""
    path = folder / "genai_config.json"
    path.write_text(path.read_text().replace('"filename": ', '"filename": "../x",\n   "filename": '))
    reseal(folder)


def graph(change):
    def edit(folder):
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        reseal(folder)

    return edit


def foreign_function(model):
    model.functions.append(helper.make_function("evil", "f", ["x"], ["y"], [], [helper.make_opsetid("", 21)]))


def branch(model):
    body = helper.make_graph([helper.make_node("Constant", [], ["c"], value_int=1)], "inner", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("then_branch", body))


def data_in(name):
    def change(model):
        tensor = next(one for one in model.graph.initializer if one.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = name

    return change


def program(old, new):
    assert len(old) == len(new)

    def edit(folder):
        data = (folder / "model.pte").read_bytes()
        assert old in data
        (folder / "model.pte").write_bytes(data.replace(old, new))
        reseal(folder)

    return edit


def patched(find, new):
    """Other bytes where a search of the program's bytes says."""

    def edit(folder):
        data = bytearray((folder / "model.pte").read_bytes())
        for at in find(bytes(data)):
            data[at : at + len(new)] = new
        (folder / "model.pte").write_bytes(data)
        reseal(folder)

    return edit


def graphs(data):
    """Where the XNNPACK graphs of a program begin, at their heads."""
    return [found.start() - 4 for found in re.finditer(b"XH00", data)]


def records(data, number, of):
    """Places of the field with that number in the records of a list of each XNNPACK graph."""
    for start in graphs(data):
        (inside,) = struct.unpack_from("<I", data, start + 10)
        root = Table(data, start + inside + struct.unpack_from("<I", data, start + inside)[0])
        at = root.Offset(4 + 2 * of)
        for i in range(root.VectorLen(at)):
            one = Table(data, root.Indirect(root.Vector(at) + 4 * i))
            if field := one.Offset(4 + 2 * number):
                yield one.Pos + field


def datatypes(data):
    """Places of the datatypes of plain values in XNNPACK's graphs."""
    for at in records(data, 1, 2):
        one = Table(data, at + struct.unpack_from("<I", data, at)[0])
        if (field := one.Offset(4)) and one.Get(number_types.Int16Flags, one.Pos + field) == 1:
            yield one.Pos + field


def shared_lists(data):
    """A list of the program's methods that is as long as the file: each entry is the same method."""
    root = Table(data, struct.unpack_from("<I", data)[0])
    return [root.Vector(root.Offset(6)) - 4]


def package(change):
    def edit(folder):
        spec = Model_pb2.Model()
        spec.ParseFromString((folder / MODEL).read_bytes())
        change(spec)
        (folder / MODEL).write_bytes(spec.SerializeToString())
        reseal(folder)

    return edit


def operations(spec):
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    return block.operations


def contents(change):
    def edit(folder):
        path = folder / PACKAGE / "Manifest.json"
        path.write_text(change(path.read_text()))
        reseal(folder)

    return edit


def unknown_field(name):
    """A field of a protobuf that this version of its schema does not have, which other readers may follow."""

    def edit(folder):
        with (folder / name).open("ab") as file:
            file.write(b"\xfa\xf0\x04\x04evil")
        reseal(folder)

    return edit


def nested_weights(spec):
    one = next(one for one in operations(spec) if one.attributes["val"].immediateValue.HasField("tensor"))
    value = one.attributes["val"].immediateValue.list.values.add()
    value.blobFileValue.fileName = "@model_path/../../../../secret"


def fields_of_data(model):
    next(one for one in model.graph.initializer if one.external_data).external_data.add(key="checksum", value="x")


def with_holes(name):
    """Far larger than the manifest says, without taking any room: to hash it takes an hour."""

    def edit(folder):
        os.truncate(folder / name, 2**42)

    return edit


def listed(change):
    return lambda folder: edit_manifest(folder, change)


def linked(name, to):
    """A link instead of a file or folder, made before the folder is sealed by hand."""

    def change(folder):
        place = folder.parent / "outside"
        (folder / name).rename(place)
        (folder / name).symlink_to(to or place)

    return change


def piped(folder):
    (folder / "model.pte").unlink()
    os.mkfifo(folder / "model.pte")
    edit_manifest(folder, lambda fields: fields["files"].pop("model.pte"))


def without_model(folder):
    """The model is another's, and no digest covers it."""
    edit_manifest(folder, lambda fields: fields["files"].pop("model.onnx"))


def tokenizer_config(**fields):
    def change(folder):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        reseal(folder)

    return change


HOSTILE = {
    "a library": (ONNX, added("libcustom.so"), "file 'libcustom.so': no part of an artifact of onnx_kv; refused"),
    "Python code": (ONNX, added("__init__.py"), "file '__init__.py': no part"),
    "code deeper": (PTE, added("additional_chat_templates/x.py"), "file 'additional_chat_templates/x.py': no part"),
    "a template deeper": (PTE, added("additional_chat_templates/a/x.jinja"), "a/x.jinja': no part"),
    "a template that hides": (
        ONNX, beside("additional_chat_templates/.x.jinja"), "additional_chat_templates/.x.jinja: not listed"),
    "a hidden template that is a pipe": (
        ONNX, beside("additional_chat_templates/.x.jinja", os.mkfifo), ".x.jinja: neither a file nor a folder"),
    "weights beside": (PTE, added("weights.ptd"), "file 'weights.ptd': no part of an artifact of pte"),
    "a file in the package": (COREML, added(f"{PACKAGE}/Data/more.bin"), "Data/more.bin': no part"),
    "a hidden file that is listed": (
        ONNX, listed(lambda f: f["files"].update({".x": f["files"]["model.onnx"]})), "file '.x': no part"),
    "the model is not listed": (ONNX, without_model, "files do not hold 'model.onnx', a part of the artifact"),
    "another artifact": (
        ONNX, listed(lambda f: f["plan"]["target"].update(artifact="tokenizer.json")), "expected 'model.onnx'"),
    "an unknown format": (ONNX, listed(lambda f: f["plan"]["target"].update(backend="os.path")), "unknown backend"),
    "another format": (ONNX, listed(lambda f: f["plan"]["target"].update(backend="pte")), "expected 'model.pte'"),
    "a link": (ONNX, linked("model.onnx.data", None), "model.onnx.data: a link"),
    "a link to a device": (PTE, linked("tokenizer.json", "/dev/zero"), "tokenizer.json: a link"),
    "the card is a link": (ONNX, linked("README.md", None), "README.md: a link"),
    "the package is a link": (COREML, linked(PACKAGE, None), f"{PACKAGE}: a link"),
    "a pipe": (PTE, piped, "model.pte: neither a file nor a folder"),
    "a native library in the configuration": (
        ONNX,
        genai(lambda d: d["session_options"].update(custom_ops_library="./libcustom.so")),
        "session_options.custom_ops_library: not set by a build, './libcustom.so' here; refused",
    ),
    "a provider in the configuration": (
        ONNX,
        genai(lambda d: d["session_options"]["provider_options"].append({"OpenVINO": {"config": "/x"}})),
        "model.decoder.session_options.provider_options.0.OpenVINO.config: not set by a build, '/x' here",
    ),
    "a path in the configuration": (ONNX, genai(lambda d: d.update(filename="../model.onnx")), "'../model.onnx' here"),
    "an option taken out": (
        ONNX, genai(lambda d: d["session_options"].pop("log_id")), "'onnxruntime-genai' in a build, missing here"),
    "a number that Python holds for equal": (
        ONNX, genai(lambda d: d.update(num_hidden_layers=float(d["num_hidden_layers"]))), "not written as a build"),
    "a key given twice": (ONNX, twice, "not written as a build writes it"),
    "an operator": (
        ONNX, graph(lambda m: m.graph.node.append(helper.make_node("PyOp", ["logits"], ["y"], domain="evil"))),
        "operator 'PyOp' of 'evil'"),
    "an operator under another domain": (
        ONNX, graph(lambda m: setattr(m.graph.node[0], "domain", "evil")), "of 'evil'; refused"),
    "a domain": (ONNX, graph(lambda m: m.opset_import.append(helper.make_opsetid("evil", 1))), "operators of 'evil'"),
    "a function": (ONNX, graph(foreign_function), "the model has functions; refused"),
    "a subgraph": (ONNX, graph(branch), ".then_branch' has g; refused"),
    "metadata": (ONNX, graph(lambda m: m.metadata_props.add(key="ort_config", value="{}")), "has metadata_props"),
    "an unknown field": (ONNX, unknown_field("model.onnx"), "model.onnx: holds fields that no build writes; refused"),
    "more about data": (ONNX, graph(fields_of_data), "external data with 'checksum'; refused"),
    "a file with holes": (ONNX, with_holes("model.onnx.data"), f"{2**42} bytes, manifest.json says"),
    "a tokenizer with holes": (
        ONNX, listed(lambda f: f["files"]["tokenizer.json"].update(bytes=2**40)), f"{2**40} bytes, which no such file"),
    "data in another file": (ONNX, graph(data_in("tokenizer.json")), "external data 'tokenizer.json', not model.onnx"),
    "data outside": (ONNX, graph(data_in("../secret")), "external data '../secret'"),
    "a kernel": (PTE, program(b"llama::custom_sdpa", b"evil::custom_sdpa!"), "operator 'evil::custom_sdpa!.out'"),
    "a delegate": (PTE, program(b"XnnpackBackend", b"QnnBackendEvil"), "delegate 'QnnBackendEvil'; refused"),
    "a method": (PTE, program(b"get_vocab_size", b"get_vocab_evil"), "method 'get_vocab_evil'; refused"),
    "another name for a buffer of the cache": (
        PTE, program(b"layers.0.key_cache", b"layers.0.kex_cache"), "a tensor named 'layers.0.kex_cache' of [1, 256, "),
    "data beside the segments": (
        PTE, patched(lambda d: [at + 22 for at in graphs(d)], bytes([1])), "graph 0 has data inside of it"),
    "a graph that leaves its segment": (
        PTE, patched(lambda d: [at + 14 for at in graphs(d)], bytes(3) + b"\x01"), "XNNPACK graph 0 has another head"),
    "a node of XNNPACK": (
        PTE, patched(lambda d: records(d, 0, 1), bytes([6])), "XNNPACK graph 0 has a node of kind 6; refused"),
    "a datatype of XNNPACK": (PTE, patched(datatypes, bytes([4])), "graph 0 has a value of datatype 4; refused"),
    "lists that lie in each other": (
        PTE, patched(shared_lists, struct.pack("<I", 2**30)), "model.pte is not readable: "),
    "a method's answer": (
        PTE, listed(lambda f: f["tokenizer"].update(eos_ids=[1])), "get_eos_ids returns [257], the manifest has [1]"),
    "an operation": (
        COREML, package(lambda s: setattr(operations(s)[-1], "type", "custom_layer")), "operation 'custom_layer'"),
    "a second function": (
        COREML, package(lambda s: s.mlProgram.functions["evil"].CopyFrom(s.mlProgram.functions["main"])),
        "function 'evil'; refused"),
    "weights outside, in a list": (COREML, package(nested_weights), "a value that is no tensor, of operation 'const'"),
    "an unknown field of a package": (COREML, unknown_field(MODEL), "holds fields that no build writes; refused"),
    "more about an item": (
        COREML, contents(lambda text: text.replace('"name": "weights",', '"name": "weights", "url": "http://x",')),
        "Manifest.json: not written as a build writes it; refused"),
    "an item given twice": (
        COREML, contents(lambda text: text.replace('"path": "com', '"path": "../x", "path": "com', 1)),
        "Manifest.json: not written as a build writes it; refused"),
    "weights outside": (
        COREML,
        package(lambda s: operations(s)[0].attributes["x"].blobFileValue.MergeFromString(b"\x0a\x0a@x/../../y")),
        "weight file '@x/../../y'; refused",
    ),
    "another kind of model": (COREML, package(lambda s: s.pipeline.SetInParent()), "the model has pipeline"),
    "other metadata": (
        COREML, package(lambda s: s.description.metadata.userDefined.update(plan="x")), "metadata is not that of"),
    "code of a tokenizer": (
        ONNX, tokenizer_config(auto_map={"AutoTokenizer": ["x.Evil", None]}), "auto_map: names code or other files"),
    "another tokenizer file": (ONNX, tokenizer_config(fast_tokenizer_files=["tokenizer.4.json"]), "fast_tokenizer"),
    "a tokenizer outside": (ONNX, tokenizer_config(tokenizer_file="/etc/passwd"), "tokenizer_file: names code"),
    "a vocabulary outside": (PTE, tokenizer_config(vocab_file="../vocab.json"), "vocab_file: names code"),
}  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    """The model is read in this process: no import of the libraries for every case."""
    monkeypatch.setattr(verification, "in_child", lambda folder, limit_s: model_checks.check(folder))


@pytest.fixture
def refused(here, command, export_command, capsys, setting, tmp_path):
    """What each of all that open an artifact says of a folder."""

    def ask(folder):
        described = manifest.read(folder)
        plan = described.plan
        given = Limits(quant=plan.quant.limits, target=plan.target.limits)  # or another target is refused by name
        options = tasks.TaskOptions(("x",), None, False, False, None, 1, 1.0)
        yield "verify", verification.verify(folder, 100)[0]
        record = validate.validate(folder, described, replace(setting, limits=given))
        assert record.outcome is Outcome.DAMAGED
        yield "validate", record.detail
        assert command("chat", folder) == 1
        yield "chat", capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")
        with pytest.raises(ExportError) as raised:
            tasks.evaluate([(folder, described)], options, tmp_path)
        yield "tasks", str(raised.value)
        yield "baseline", baseline.judge(folder, tmp_path / "none", "host").problem
        for name, others in (("inspect", ()), ("diff", (folder,))):
            code, out, err = export_command(name, folder, *others)
            assert (code, out) == (1, "")
            yield name, err.removeprefix("error: ").rstrip()
        (tmp_path / "key").touch()
        code, out, err = export_command("sign", folder, "--key", tmp_path / "key")
        assert (code, out) == (1, "")
        yield "sign", err.removeprefix("error: ").rstrip()

    return ask


@pytest.mark.hostile(
    "artifact",
    "libraries, code, links, pipes, options, operators, nodes and references that no build writes",
    "refused, in the same line by every command",
)
@pytest.mark.parametrize("what", HOSTILE)
def test_whatever_opens_an_artifact_refuses_a_hostile_one_alike(what, tiny, tmp_path, refused):
    target, change, words = HOSTILE[what]
    folder = shutil.copytree(tiny(target), tmp_path / "artifact")
    change(folder)
    said = dict(refused(folder))
    assert words in said["verify"]
    assert {who: line for who, line in said.items() if line != said["verify"]} == {}


RECIPES = ("fp32", "int4-g32", "int4-mixed")


@pytest.mark.parametrize(
    ("target", "recipes"), [(ONNX, (*RECIPES, "int4-g32-head4")), (PTE, RECIPES), (COREML, RECIPES)]
)
def test_honest_artifacts_of_every_recipe_are_admitted(target, recipes, tiny):
    """As are all that other tests build: `export_with` asks, too."""
    for recipe in recipes:
        folder = tiny(target, recipe)
        assert list(admission.findings(folder, manifest.read(folder))) == [], recipe
