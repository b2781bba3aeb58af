"""Bytes per token, host overhead and their arithmetic, on the tiny model's own files."""

import re
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from export import checkpoints as checkpoint
from export import manifest
from export.checkpoints.seed import SeededSource
from export.formats.onnx_kv import graph, read
from export.plan import ModelSpec, load_named
from export.toolbox.tables import NONE
from runtime_tests.bench import contenders, forms, runners, tables
from runtime_tests.bench.results import HostOverhead, Timing
from runtime_tests.jobs import OverheadJob
from runtime_tests.sessions import session_module
from tests.support.benchmarks import stored_run

LINEARS, HEAD = 2 * 557_056, 512 * 256
"""Numbers in all linears of a layer (q and o 256 × 256, k and v 64 × 256, three of 512 × 256), and in the tied head."""


@pytest.fixture(scope="module")
def random_tiny():
    return checkpoint.load(load_named(ModelSpec, "models", "tiny"), None)


def test_a_gguf_is_read_whole_but_for_an_embedding_that_is_not_the_head(random_tiny, tmp_path):
    forms.write_gguf(random_tiny, tmp_path)
    assert gguf_bytes(tmp_path / forms.GGUF) == 4 * (LINEARS + HEAD)
    untied = random_tiny.architecture.model_copy(update={"tie_word_embeddings": False})
    (tmp_path / "untied").mkdir()
    forms.write_gguf(checkpoint.Checkpoint(SeededSource("20", untied), "seed:20", untied), tmp_path / "untied")
    assert gguf_bytes(tmp_path / "untied" / forms.GGUF) == 4 * (LINEARS + HEAD)


def test_an_onnx_file_says_what_its_products_read(tiny):
    folder = tiny("onnx-cpu")
    count = contenders.weight_bytes(folder / "model.onnx", manifest.read(folder), ours=True)
    integers = LINEARS // 2 + HEAD
    assert count == integers + LINEARS // 32 * 2 + 512 * 2  # bfloat16 scales
    assert count < sum(path.stat().st_size for path in folder.glob("model.onnx*"))


def test_float_weights_are_counted_too(tiny, monkeypatch):
    model = tiny("onnx-cpu", "fp32") / "model.onnx"
    assert read.product_bytes(model) == 4 * (LINEARS + HEAD)
    monkeypatch.setattr(read, "MATMULS", read.MATMULS - {"FusedMatMul"})
    assert read.product_bytes(model) == 0


def test_nf4_weights_are_counted_with_their_scales(tmp_path):
    """Codes, two to a byte, and a bfloat16 scale per block that becomes float32 on its way."""
    codes = helper.make_tensor("w.q", TensorProto.UINT8, [64], bytes(64), raw=True)
    scales = helper.make_tensor("w.scale", TensorProto.BFLOAT16, [2], bytes(4), raw=True)
    nodes = [
        helper.make_node("Cast", ["w.scale"], ["w.float"], to=TensorProto.FLOAT),
        helper.make_node("MatMulBnb4", ["x", "w.q", "w.float"], ["y"], domain="com.microsoft"),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], [codes, scales])), tmp_path / "model.onnx")
    assert read.product_bytes(tmp_path / "model.onnx") == 64 + 4


def test_every_product_that_the_graph_writes_is_counted():
    written = set(re.findall(r'graph\.node\("(\w*MatMul\w*)"', Path(graph.__file__).read_text()))
    assert written == graph.MATMULS


def test_a_pte_reads_what_its_recipe_says(tiny):
    pytest.importorskip("executorch")
    folder = tiny("executorch-xnnpack")
    described = manifest.read(folder)
    ours, stock = (contenders.weight_bytes(folder / "model.pte", described, ours=mine) for mine in (True, False))
    assert ours == LINEARS * 4.5 / 8 + HEAD + 512 * 2
    assert stock == (LINEARS + HEAD) * 4.5 / 8


def gguf_bytes(model):
    return contenders.weight_bytes(model, None, ours=False)


def test_the_cache_of_a_position(random_tiny):
    assert contenders.kv_bytes_per_position(random_tiny.architecture, "float32") == 2 * 2 * 2 * 32 * 4
    assert contenders.kv_bytes_per_position(random_tiny.architecture, "float16") == 2 * 2 * 2 * 32 * 2


def test_the_share_of_the_bound_pairs_a_rate_with_the_bandwidth_of_its_repetition():
    """120, 100 and 80 tok/s of 80 MB + 12 positions of 0.1 MB each, where 40, 20 and 10 GB/s were measured."""
    run = stored_run()
    near = run.bound_share(run.entries[0], Timing.decode_tps, run.settings.near_position)
    assert near.median == pytest.approx(100 * 81.2e6 / 20e9)
    header, ours, _, dead = tables.bandwidth(run)
    cells = dict(zip(header, ours, strict=True))
    assert (cells["cache at 12 MB"], cells["cache at 160 MB"]) == ("1.2", "16.0")
    assert cells["share of bandwidth at 160"].startswith("0.24 (")
    assert dead[4] == NONE


def test_memory_stands_beside_model_cache_and_allowance():
    header, ours, _, dead = tables.memory(stored_run())
    cells = dict(zip(header, ours, strict=True))
    assert (cells["model MB"], cells["cache MB"], cells["model + cache + 150 MB"]) == ("90.0", "25.6", "266")
    assert (cells["peak RSS after 8 tokens MB"], cells["peak RSS after 128 tokens MB"]) == ("300", "400")
    assert dead[-1] == NONE


def test_far_is_shown_only_where_it_was_timed():
    header, ours, *_ = tables.long_context(stored_run())
    assert ours[header.index("far over near")] == "0.50 (0.50–0.50)"
    run = stored_run()
    without = run.model_copy(update={"settings": run.settings.model_copy(update={"far_prompt": 0})})
    assert tables.long_context(without) == []
    assert not any("160" in cell for cell in tables.bandwidth(without)[0])


def test_overhead_is_what_the_runtimes_calls_leave_of_the_steps():
    measured = HostOverhead(label="x", step_ns=(1000, 3000, 1000), runtime_ns=(900, 2900, 950))
    assert measured.share == pytest.approx(0.05)
    assert measured.own_s == pytest.approx(100e-9)


@pytest.mark.parametrize(("target", "package"), [("onnx-cpu", "onnxruntime"), ("executorch-xnnpack", "executorch")])
def test_a_sessions_runtime_calls_are_found_and_put_back(tiny, target, package):
    pytest.importorskip(package)
    folder = tiny(target)
    methods = session_module(manifest.read(folder)).runtime_calls()
    before = [getattr(owner, name) for owner, name in methods]
    job = OverheadJob(folder=str(folder), threads=1, prompt=(3, 4, 5), generate=4)
    measured = HostOverhead(label=target, **{k: tuple(v) for k, v in runners.measure_overhead(job).items()})
    assert len(measured.step_ns) == 4
    assert 0 < measured.share < 1
    assert [getattr(owner, name) for owner, name in methods] == before


def test_a_session_whose_call_is_not_seen_has_no_overhead(built):
    with pytest.raises(ValueError, match="a step made none of the runtime's calls"):
        runners.measure_overhead(OverheadJob(folder=str(built), threads=1, prompt=(3,), generate=1))
