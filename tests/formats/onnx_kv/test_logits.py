"""An ONNX artifact's logits with a filled cache, for every scheme."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from export import manifest
from export.checkpoints.tokenizer import load as load_tokenizer
from export.formats.onnx_kv import block_size
from export.formats.onnx_kv.graph import sensitive
from export.pipeline import export
from tests.support.metrics import random_tokens
from tests.support.onnx import (
    DECODE,
    GROUPS_4,
    PER_CHANNEL_8,
    PREFILL,
    assert_same_integers,
    compare,
    copy_with,
    readback,
    session_of,
    tiny,
)


@pytest.mark.parametrize("fixture", ["artifact", "untied"])
def test_logits_with_a_filled_cache_are_those_of_the_quantized_model(request, fixture):
    folder = request.getfixturevalue(fixture)
    kl, top1, sqnr = compare(folder, random_tokens(PREFILL + DECODE))
    limits = manifest.read(folder).plan.target.limits
    assert kl <= limits.max_mean_kl / 4  # two layers only
    assert top1 >= limits.min_top1
    assert sqnr >= 30


def test_one_damaged_scale_row_shows_in_the_logits(untied, tmp_path):
    def damage(scales):
        scales[:8] *= 2

    bad = copy_with(untied, tmp_path / "bad", "model.layers.0.self_attn.o_proj.weight.scale", damage)
    kl, _, sqnr = compare(bad, random_tokens(PREFILL + DECODE))
    assert kl > manifest.read(bad).plan.target.limits.max_mean_kl / 10
    assert sqnr < 30


def with_level(folder: Path, to: Path, level: int) -> Path:
    """A copy of an artifact with one accuracy_level for all MatMulNBits."""
    shutil.copytree(folder, to)
    proto = onnx.load(to / "model.onnx", load_external_data=False)
    for entry in (entry for node in proto.graph.node for entry in node.attribute):
        if entry.name == "accuracy_level":
            entry.i = level
    (to / "model.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    return to


def test_linears_that_rounded_activations_hurt_most_are_computed_in_float(artifact):
    levels = {
        node.input[1].removesuffix(".weight.q"): next(a.i for a in node.attribute if a.name == "accuracy_level")
        for node in onnx.load(artifact / "model.onnx", load_external_data=False).graph.node
        if node.op_type == "MatMulNBits"
    }
    in_float = [name.removeprefix("model.layers.") for name, level in levels.items() if level == 1]
    assert in_float == ["0.self_attn.qkv_proj", "0.mlp.down_proj", "1.mlp.down_proj"]
    assert set(levels.values()) == {1, 4}
    assert manifest.read(artifact).lowering["float_activation_nodes"] == len(in_float)


def test_the_chosen_float_activations_reduce_the_error(untied, tmp_path):
    """int8 in all linears is worse than the artifact's choice, float in all is exact."""
    ids = random_tokens(PREFILL + DECODE)
    shipped, all_int8, all_float = (
        compare(folder, ids)[0]
        for folder in (untied, with_level(untied, tmp_path / "int8", 4), with_level(untied, tmp_path / "float", 1))
    )
    assert all_float < shipped / 100
    assert all_int8 > 1.5 * shipped


def test_eight_bit_weights_stay_out_of_the_slow_float_kernel(tmp_path):
    export(tiny(linear=PER_CHANNEL_8), None, tmp_path / "int8")
    assert manifest.read(tmp_path / "int8").lowering["float_activation_nodes"] == 0


def test_a_quarter_of_the_layers_counts_as_early():
    qkv = {f"model.layers.{i}.self_attn.qkv_proj.weight" for i in range(4)}
    stacked = {name for name in sensitive(16) if "qkv" in name}
    assert stacked == qkv
    assert {name for name in sensitive(16) if "mlp" in name} == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.15.mlp.down_proj.weight",
    }


@pytest.mark.parametrize(
    ("columns", "block"), [(8192, 256), (2048, 128), (3072, 128), (576, 32), (1184, 32), (272, 16), (48, 16), (264, 0)]
)
def test_a_channel_is_cut_into_small_blocks_because_activations_are_rounded_per_block(columns, block):
    assert block_size(PER_CHANNEL_8, columns) == block


@pytest.mark.parametrize("tied", [True, False])
def test_the_float_recipe_is_the_float_model(tmp_path, tied):
    export(tiny("fp32", tied=tied), None, tmp_path / "fp32")
    kl, top1, sqnr = compare(tmp_path / "fp32", random_tokens(PREFILL + DECODE))
    assert abs(kl) < 1e-6
    assert top1 == 1
    assert sqnr > 90
    assert list(readback(tmp_path / "fp32")) == []


@pytest.mark.parametrize(
    ("linear", "table", "tied"),
    [(PER_CHANNEL_8, None, False), (None, GROUPS_4, True), (GROUPS_4, GROUPS_4, False)],
    ids=["int8-linears", "int4-tied-table", "int4-untied-table"],
)
def test_every_scheme_keeps_integers_and_logits(tmp_path, linear, table, tied):
    folder = tmp_path / "variant"
    export(tiny(linear=linear, table=table, tied=tied), None, folder)
    assert_same_integers(folder)
    assert compare(folder, random_tokens(PREFILL + DECODE))[2] >= 25


def test_the_cache_continues_for_any_cutting_into_pieces(untied):
    ids, session = random_tokens(96), session_of(untied)
    at_once = session.feed(ids)
    session.reset()
    for start, end in ((0, 1), (1, 30), (30, 31), (31, 90), (90, 96)):
        in_pieces = session.feed(ids[start:end])
    np.testing.assert_allclose(in_pieces, at_once, rtol=0, atol=0.02 * np.abs(at_once).max())
    session.reset()
    assert not np.allclose(session.feed(ids[-1:]), at_once, atol=0.02 * np.abs(at_once).max())


def test_the_last_slot_can_be_fed_and_the_next_is_refused(artifact):
    session, length = session_of(artifact), manifest.read(artifact).contract.kv.context_length
    session.feed(random_tokens(length - 1))
    session.feed([1])
    with pytest.raises(ValueError, match=f"context holds {length}"):
        session.feed([1])
    with pytest.raises(ValueError, match="no tokens"):
        session.feed([])


@pytest.mark.slow
def test_real_weights_keep_their_logits(real):
    folder = real("onnx-cpu")
    text = (manifest.ROOT / "export" / "model.py").read_text(encoding="utf-8")
    ids = load_tokenizer(folder).encode(text)[: PREFILL + 200]
    kl, _, sqnr = compare(folder, ids)
    assert_same_integers(folder)
    assert kl <= 0.01  # int8 activations of onnxruntime; code scatters more than prose
    assert sqnr >= 20
