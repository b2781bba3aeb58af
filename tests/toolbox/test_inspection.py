"""`python -m export inspect` and `diff`: what they say of real artifacts of every format, and of files of others."""

import json
import os
import shutil
from statistics import mean, stdev

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export import formats, manifest, plan
from export.__main__ import app
from export.architecture import EMBEDDING, HEAD
from export.errors import ExportError
from export.toolbox import commands, difference, evidence, inspection
from export.toolbox.sizes import module_sizes
from tests.support.artifacts import reseal
from tests.support.records import sample_record

FORMATS = ("onnx-cpu", "executorch-xnnpack", "coreml")


@pytest.fixture(params=FORMATS)
def folder(request, tiny):
    return tiny(request.param)


def schemes(folder):
    return {layer.name: layer.scheme for layer in inspection.inspect(folder).layers}


def test_a_layer_has_one_name_and_scheme_in_every_format(tiny):
    found = [schemes(tiny(name)) for name in FORMATS]
    described = manifest.read(tiny(FORMATS[0]))
    assert set(found[0]) == {EMBEDDING, HEAD, *described.architecture.linear_shapes()}
    assert found[0][EMBEDDING] == found[0][HEAD] == "int8 per channel"
    assert {found[0][name] for name in described.architecture.linear_shapes()} == {"int4 g32"}
    assert found[0] == found[1] == found[2]


def test_bytes_of_modules_are_those_of_the_shapes_and_sum_to_the_file(folder):
    inspected = inspection.inspect(folder)
    a = inspected.manifest.architecture
    linears = sum(rows * columns for rows, columns in a.linear_shapes().values())
    sizes = {(size.module, size.dtype): size.bytes for size in inspected.sizes}
    assert sizes["attention", "int4"] + sizes["mlp", "int4"] == linears // 2
    assert (sizes["embedding", "int8"], sizes["head", "int8"]) == (a.vocab_size * a.hidden_size, 0)
    assert sizes["norms", "float32"] == 4 * a.hidden_size * (2 * a.num_hidden_layers + 1)
    assert sum(sizes.values()) == inspected.manifest.artifact_bytes
    assert 0 < sizes["graph", ""] < 100_000


def test_every_norm_is_named(folder):
    inspected = inspection.inspect(folder)
    wanted = {name for name in inspected.manifest.architecture.tensor_shapes() if "norm" in name}
    assert {tensor.name for tensor in inspected.contents.tensors if "norm" in tensor.name} == wanted


def test_a_float_model_has_float_layers(tiny):
    found = schemes(tiny("onnx-cpu", "fp32"))
    assert set(found.values()) == {"float32"}
    assert found.keys() == schemes(tiny("onnx-cpu")).keys()


def test_entries_caches_and_operations_of_each_format(tiny):
    found = {name: inspection.inspect(tiny(name)).contents for name in FORMATS}
    pte = found["executorch-xnnpack"]
    returned = {entry.name: entry.value for entry in pte.entries}
    assert (returned["forward"], returned["get_n_layers"], returned["use_kv_cache"]) == (None, "2", "True")
    assert pte.delegate_calls == {"XnnpackBackend": manifest.read(tiny("executorch-xnnpack")).lowering["delegates"]}
    assert pte.delegated_ops["FullyConnected"] >= 15
    assert [spec.shape for spec in pte.cache] == [(1, 256, 2, 32)] * 4
    assert [(one.name, one.shape) for one in found["coreml"].cache] == [
        ("keyCache", (2, 1, 2, 256, 32)),
        ("valueCache", (2, 1, 2, 256, 32)),
    ]
    assert found["coreml"].ops["scaled_dot_product_attention"] == 2
    assert [one.name for one in found["onnx-cpu"].cache] == [
        f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")
    ]
    assert found["onnx-cpu"].ops["GroupQueryAttention"] == 2


def test_the_command_prints_tables_or_one_record(export_command, folder):
    code, out, _ = export_command("inspect", folder)
    assert code == 0
    assert "model.layers.0–1.mlp.down_proj.weight" in out
    assert manifest.read(folder).id in out
    code, out, _ = export_command("inspect", folder, "--json")
    assert code == 0
    assert inspection.Inspection.model_validate_json(out) == inspection.inspect(folder)


def test_layers_that_are_alike_are_one_row():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1, 2, 5, 10)]
    named = [(name, ("int8" if ".5." in name else "int4",)) for name in names]
    assert [row[:2] for row in inspection.alike([*named, ("lm_head.weight", ("int8",))])] == [
        ("model.layers.0–2,10.mlp.up_proj.weight", ("int4",)),
        ("model.layers.5.mlp.up_proj.weight", ("int8",)),
        ("lm_head.weight", ("int8",)),
    ]


def test_a_changed_folder_is_refused_as_verify_does(tiny, tmp_path, export_command):
    folder = shutil.copytree(tiny("onnx-cpu"), tmp_path / "copy")
    (folder / "more.txt").write_text("")
    line = f"{folder}/more.txt: not listed in manifest.json; remove it or build again\n"
    assert export_command("verify", folder)[1] == line
    assert export_command("inspect", folder) == (1, "", f"error: {line}")
    assert export_command("diff", tiny("onnx-cpu"), folder) == (1, "", f"error: {line}")


def test_a_bare_file_is_read_and_says_that_it_has_no_manifest(tiny, tmp_path, export_command, folder):
    target = manifest.read(folder).plan.target
    bare = tmp_path / f"renamed{(folder / target.artifact).suffix}"
    (shutil.copytree if (folder / target.artifact).is_dir() else shutil.copy)(folder / target.artifact, bare)
    code, out, _ = export_command("inspect", bare)
    assert code == 0
    assert inspection.NO_MANIFEST in out
    found, ours = inspection.inspect(bare).contents, inspection.inspect(folder).contents
    assert (found.ops, found.delegate_calls, found.cache) == (ours.ops, ours.delegate_calls, ours.cache)
    whole = sum(tensor.bytes for tensor in found.tensors)
    assert whole == sum(tensor.bytes for tensor in ours.tensors)


def test_another_exporters_onnx(tmp_path, export_command):
    """Plain float matrices under foreign names, a subgraph, and nothing of ours."""
    weight = helper.make_tensor("decoder.mlp.up.weight", TensorProto.FLOAT16, [4, 8], np.zeros(32, np.float16))
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 8])
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "inner", [], [value])
    nodes = [
        helper.make_node("MatMul", ["in", "decoder.mlp.up.weight"], ["x"]),
        helper.make_node("If", ["in"], ["out"], then_branch=inner, else_branch=inner),
    ]
    inputs = [helper.make_tensor_value_info("in", TensorProto.FLOAT16, ["n", 4])]
    graph = helper.make_graph(nodes, "other", inputs, [value], [weight])
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, producer_name="someone"), path)
    inspected = inspection.inspect(path)
    assert inspected.contents.ops == {"Relu": 2, "If": 1, "MatMul": 1}
    assert next((one.module, one.bytes) for one in module_sizes(inspected.contents)) == ("mlp", 64)
    assert inspected.contents.facts["producer"] == "someone"
    assert export_command("inspect", path)[0] == 0


@pytest.mark.parametrize("content", [b"", b"\x08", b"text", b"\x08\x0a\x12\xff\xff\xff\xff\xff", b"\0\0\0\0ET12junk"])
def test_what_is_no_model_is_one_line(tmp_path, export_command, content):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    code, _, error = export_command("inspect", path)
    assert (code, error.count("\n")) == (1, 1)
    assert str(path) in error.replace("\n", "")


def test_no_path_is_wrong_usage(export_command, tmp_path):
    for arguments in (["inspect", tmp_path / "no"], ["inspect"], ["diff", tmp_path], ["verify", tmp_path / "no"]):
        code, _, error = export_command(*arguments)
        assert code == 2, error


def test_no_model_has_the_name_of_a_command():
    names = {one.name or one.callback.__name__ for one in (*app.registered_commands, *commands.app.registered_commands)}
    assert names == {"build", "folders", "inspect", "diff", "verify", "sign"}
    assert not names & set(plan.names("models"))


def test_help_lists_the_commands(export_command):
    code, out, _ = export_command("--help")
    assert code == 0
    assert all(name in out for name in ("build", "inspect", "diff", "verify", "sign"))
    assert "-adapter" in export_command("build", "--help")[1]
    assert "-markdown" in export_command("diff", "--help")[1]


@pytest.fixture
def nowhere(tmp_path):
    return tmp_path / "records.jsonl"


def test_two_formats_of_one_quantization_have_the_same_numbers(tiny, nowhere):
    for other in FORMATS[1:]:
        compared = difference.compare(tiny("onnx-cpu"), tiny(other), [nowhere])
        assert compared.schemes == ()
        assert compared.weights.differing == ()
        assert compared.weights.tensors == 15
        assert {change.field for change in compared.plan} >= {"target.name", "target.backend"}
        assert compared.tools == ()
        assert compared.contract
        assert difference.UNTIMED in compared.notes


def test_another_recipe_shows_layer_by_layer(tiny, nowhere, export_command):
    a, b = tiny("onnx-cpu"), tiny("onnx-cpu", "int4-g64")
    compared = difference.compare(a, b, [nowhere])
    architecture = manifest.read(a).architecture
    linears, layers = architecture.linear_shapes(), architecture.num_hidden_layers
    assert {(change.field, change.a, change.b) for change in compared.schemes} == {
        (name, "int4 g32", "int4 g64") for name in linears
    }
    assert {weight.name for weight in compared.weights.differing} == set(linears)
    assert all(weight.scales is None and "groups" in weight.why for weight in compared.weights.differing)
    assert next(change for change in compared.plan if change.field == "quant.linear.group_size").b == "64"
    sizes = {size.module: (size.a, size.b) for size in compared.sizes}
    assert sizes["attention"][0] == sizes["attention"][1]
    assert sizes["scales"][0] > sizes["scales"][1]
    assert sizes["total"] == tuple(manifest.read(one).artifact_bytes for one in (a, b))
    code, out, _ = export_command("diff", a, b, "--markdown", "--records", nowhere)
    assert code == 0
    assert out.startswith("**")
    assert out.splitlines()[0].endswith(f" {len(linears)} linears of {layers} layers changed**")
    assert "| attention |" in out
    assert "<summary>scheme of layers (7)</summary>" in out
    assert export_command("diff", a, b, "--markdown", "--json")[0] == 2


def test_a_swapped_pair_of_scales_is_two_numbers(tiny, tmp_path, nowhere):
    folder = shutil.copytree(tiny("onnx-cpu"), tmp_path / "copy")
    name = "model.layers.1.mlp.down_proj.weight"
    stored = next(tensor for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
                  if tensor.name == f"{name}.scale")  # fmt: skip
    where = onnx.external_data_helper.ExternalDataInfo(stored)
    data = np.memmap(folder / "model.onnx.data", np.uint16, "r+", where.offset, tuple(stored.dims))
    other = int(np.flatnonzero(data[0] != data[0, 0])[0])
    data[0, [0, other]] = data[0, [other, 0]]
    data.flush()
    reseal(folder)
    compared = difference.compare(tiny("executorch-xnnpack"), folder, [nowhere])
    assert [(weight.name, weight.integers, weight.scales) for weight in compared.weights.differing] == [(name, 0, 2)]


def test_tensors_are_paired_in_any_order(tiny):
    described = manifest.read(tiny("onnx-cpu"))
    stored = list(formats.reader("onnx_kv").read_weights(tiny("onnx-cpu") / "model.onnx", described.architecture))
    pairs = list(difference.paired(iter(stored), iter(stored[:0:-1])))
    assert sorted(name for name, _, _ in pairs) == sorted(weight.name for weight in stored)
    assert [name for name, _, b in pairs if b is None] == [stored[0].name]
    assert difference.difference(stored[0].name, stored[0], None).why == "quantized in A only"


def test_speed_and_kl_come_from_the_records_of_these_very_artifacts(tiny, tmp_path):
    a, b = tiny("onnx-cpu"), tiny("coreml")
    lines = [record_of(a, [99.0, 100.0, 101.0], 0.1), record_of(b, [49.0, 50.0, 51.0], 0.2)]
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(["not json", *lines]) + "\n")
    found = {change.field: (change.a, change.b) for change in difference.compare(a, b, [records]).measured}
    assert found["host: decode of 64, tokens/s"] == ("100", "50")
    assert found["host: KL of lowering, nats"] == ("0.1", "0.2")
    other = shutil.copytree(a, tmp_path / "other")
    (other / manifest.FILE).write_text((other / manifest.FILE).read_text() + "\n")
    assert evidence.newest(other, [records]) == {}


@pytest.fixture
def headline_of(tiny, tmp_path):
    """The headline and notes of `diff` on two formats with these records, each in a file of its own."""

    def run(a_rates, b_rates, kl=(0.0312, 0.0291), **changes):
        a, b = tiny("onnx-cpu"), tiny("coreml")
        files = [tmp_path / "main.jsonl", tmp_path / "branch.jsonl"]
        files[0].write_text(record_of(a, a_rates, kl[0]) + "\n")
        files[1].write_text(record_of(b, b_rates, kl[1], **changes) + "\n")
        compared = difference.compare(a, b, files)
        assert difference.markdown(compared).startswith(f"**{compared.headline}**\n")
        return compared

    return run


def test_the_headline_says_size_speed_loss_and_layers(headline_of, tiny):
    compared = headline_of([99.0, 100.0, 101.0], [95.0, 96.0, 97.0])
    grown = manifest.read(tiny("coreml")).artifact_bytes - manifest.read(tiny("onnx-cpu")).artifact_bytes
    speed = "decode −4 % in separate runs"  # no ±: repeats of one run do not know the other
    assert compared.headline == f"{grown / 1e6:+.2f} MB, {speed}, KL 0.0312 → 0.0291, no layer changed"
    assert "decode +0 % in" in headline_of([5.0, 5.0], [5.0, 5.0]).headline


def test_the_headline_calls_what_noise_left_open_inconclusive(headline_of):
    noisy = headline_of([60.0, 100.0, 140.0], [200.0, 220.0, 240.0], outcome="inconclusive")
    assert "decode inconclusive (+120 %), KL 0.0312 → 0.0291, verdict pass → inconclusive" in noisy.headline


def test_speed_of_another_machine_is_not_compared(headline_of):
    found = headline_of([99.0, 101.0], [49.0, 51.0], environment={"cpu": "another", "cores": 2})
    assert "decode" not in found.headline
    assert not any("tokens/s" in change.field for change in found.measured)
    assert any("KL as shipped" in change.field for change in found.measured)
    assert found.notes == ("host: validated on different machines (a processor, 2 cores and another, 2 cores), so "
                           "speed and memory are not compared",)  # fmt: skip


def test_the_headline_names_a_failure_and_no_speed_of_an_emulated_device(headline_of):
    assert "verdict pass → mismatch" in headline_of([99.0, 101.0], [99.0, 101.0], outcome="mismatch").headline
    assert "verdict" not in headline_of([99.0, 101.0], [99.0, 101.0]).headline
    emulated = headline_of([99.0, 101.0], [9.0, 10.0], emulated=True)
    assert "decode" not in emulated.headline


def record_of(folder, rates, kl, **changes):
    """A line as validation writes it, as far as it is read."""
    import hashlib

    compared = {"mean_kl": kl, "top1": 0.9, "positions": 3}
    test = {"n_prompt": 0, "n_gen": 64, "avg_ts": mean(rates), "stddev_ts": stdev(rates), "samples_ts": rates}
    fields = {
        "manifest_sha256": hashlib.sha256((folder / manifest.FILE).read_bytes()).hexdigest(),
        "device": "host", "emulated": False, "started_at": "2026-01-01T00:00:00+00:00", "outcome": "pass",
        "environment": {"cpu": "a processor", "cores": 2},
        "accuracy": {"total": compared, "quantization": None, "lowering": compared},
        "latency": {"tests": [test], "peak_rss_bytes": 1},
    }  # fmt: skip
    return json.dumps(fields | changes)


def test_a_record_of_validation_is_read_and_one_of_another_version_too(tiny, tmp_path):
    folder, records = tiny("onnx-cpu"), tmp_path / "records.jsonl"
    record = sample_record(manifest_sha256=manifest.digest(folder))
    records.write_text(record.model_dump_json() + "\n")
    (before,) = evidence.newest(folder, [records]).values()
    assert before.numbers() == record.numbers()
    assert before.numbers()["decode of 64, tokens/s"] == record.latency.tests[-1].avg_ts
    later = record.model_dump(mode="json") | {"schema_version": 99, "added": 1, "started_at": "2027-01-01T00:00:00"}
    records.write_text(f"{records.read_text()}{json.dumps(later)}\n")
    assert evidence.newest(folder, [records])["host"].started_at == "2027-01-01T00:00:00"
    del later["environment"]["cpu"]
    records.write_text(json.dumps(later))
    assert evidence.newest(folder, [records]) == {}


def test_a_damaged_model_in_a_folder_is_one_line(tiny, tmp_path, folder, export_command):
    copy = shutil.copytree(folder, tmp_path / "copy")
    artifact = copy / manifest.read(copy).plan.target.artifact
    file = next(artifact.rglob("*.mlmodel"), artifact)
    file.write_bytes(file.read_bytes()[:1000])
    code, _, error = export_command("inspect", copy)
    assert (code, error.count("\n")) == (1, 1)
    assert "error:" in error
    with pytest.raises(ExportError):
        difference.compare(copy, copy, [tmp_path / "none"])


def test_a_pipe_is_not_waited_for_nor_a_device_read_to_its_end(tmp_path, export_command):
    os.mkfifo(pipe := tmp_path / "model.pte")
    for path, what in ((pipe, "a pipe"), ("/dev/zero", "a device")):
        for words in (("inspect", path), ("diff", path, path)):
            line = f"error: {path}: {what}, no file; give an artifact folder or a model file\n"
            assert export_command(*words) == (1, "", line)


# ── the picture ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_picture_shows_bytes_and_every_linears_scheme_and_frames_what_differs(tiny, tmp_path):
    from xml.etree import ElementTree

    from export.toolbox import inspection

    one, other = (inspection.inspect(tiny("onnx-cpu", quant)) for quant in ("int4-g32", "int4-g64"))
    drawn = ElementTree.fromstring(inspection.draw([one, other]))
    boxes = [node for node in drawn.iter() if node.tag.endswith("rect") and len(node)]
    titles = [node[0].text for node in boxes]
    for scheme in ("int4 g32", "int4 g64"):
        assert sum(title.endswith(f"_proj.weight: {scheme}") for title in titles) == 2 * 7
    framed = [node[0].text for node in boxes if node.get("stroke")]
    assert len(framed) == 2 * 7
    assert all(title.endswith("int4 g64") for title in framed)
    widths = [float(node.get("width")) for node in boxes if " MB" in node[0].text]
    larger = max(found.contents.bytes for found in (one, other))
    share = (one.contents.bytes + other.contents.bytes) / larger
    assert sum(widths) == pytest.approx(share * (inspection.WIDTH - 2 * inspection.MARGIN), rel=1e-2)


def test_a_picture_that_cannot_be_written_is_one_line(tiny, tmp_path):
    from export.toolbox import commands

    with pytest.raises(ExportError, match="cannot be written"):
        commands.draw(tmp_path / "none" / "picture.svg", inspection.inspect(tiny("onnx-cpu")))
    commands.draw(None)
