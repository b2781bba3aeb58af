"""The weights in an ONNX artifact: the quantizer's integers and scales, stored once and reproducibly."""

import shutil

import numpy as np
import onnx
import pytest
import torch

from export import manifest, plan
from export.architecture import EMBEDDING
from export.errors import ExportError
from export.formats import onnx_kv
from export.formats.onnx_kv.weights import shortest
from export.pipeline import export
from tests.support.onnx import PER_CHANNEL_8, assert_same_integers, copy_with, readback, tiny


def test_integers_and_scales_in_the_file_are_the_quantizers(artifact):
    assert_same_integers(artifact)


def test_a_flipped_group_scale_shows_in_the_read_back(artifact, tmp_path):
    def flip(scales):
        scales[3, 1] *= 1.01

    name = "model.layers.1.self_attn.qkv_proj.weight.scale"
    with pytest.raises(AssertionError, match="q_proj"):
        assert_same_integers(copy_with(artifact, tmp_path / "bad", name, flip))


def test_a_flipped_nibble_shows_in_the_read_back(artifact, tmp_path):
    def flip(codes):
        codes[5, 2, 3] ^= 0x10

    with pytest.raises(AssertionError, match="down_proj"):
        assert_same_integers(copy_with(artifact, tmp_path / "bad", "model.layers.0.mlp.down_proj.weight.q", flip))


def test_per_channel_integers_and_scales_are_the_quantizers(tmp_path):
    export(tiny(linear=PER_CHANNEL_8), None, tmp_path / "channel")
    recipe = manifest.read(tmp_path / "channel").plan.quant
    assert recipe.linear == PER_CHANNEL_8
    assert_same_integers(tmp_path / "channel")


def test_scales_that_the_graph_changes_are_refused(artifact, tmp_path):
    bad = shutil.copytree(artifact, tmp_path / "bad")
    proto = onnx.load(bad / "model.onnx", load_external_data=False)
    cast = next(
        node for node in proto.graph.node if node.output[0] == "model.layers.1.mlp.down_proj.weight.scale.float"
    )
    cast.op_type = "Exp"
    (bad / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match=r"down_proj.*scales are computed by Exp"):
        readback(bad)


def test_scales_are_stored_as_the_quantizer_chose_them(artifact):
    """Two bytes each, one per group or row; onnxruntime casts them to float32 when it loads the file."""
    initializers = onnx.load(artifact / "model.onnx", load_external_data=False).graph.initializer
    scales = {t.name: t for t in initializers if t.name.endswith(".scale")}
    assert {onnx.TensorProto.DataType.Name(t.data_type) for t in scales.values()} == {"BFLOAT16"}
    assert list(scales[f"{EMBEDDING}.scale"].dims) == [512, 1]


def test_a_scale_that_is_no_bfloat16_is_refused():
    with pytest.raises(ExportError, match="not a bfloat16"):
        shortest(torch.tensor([[1.0], [1.001]]), common=True)


def test_a_truncated_data_file_is_refused(artifact, tmp_path):
    bad = shutil.copytree(artifact, tmp_path / "bad")
    data = (bad / "model.onnx.data").read_bytes()
    (bad / "model.onnx.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(ExportError, match="ends before"):
        readback(bad)


def test_a_tied_embedding_is_stored_once(artifact):
    a = manifest.read(artifact).architecture
    tables = [
        tensor.name
        for tensor in onnx.load(artifact / "model.onnx", load_external_data=False).graph.initializer
        if tensor.dims[0] == a.vocab_size and np.prod(tensor.dims) == a.vocab_size * a.hidden_size
    ]
    assert tables == [f"{EMBEDDING}.q"]
    assert manifest.read(artifact).lowering["shared_embedding_bytes"] >= a.vocab_size * a.hidden_size


def test_the_same_inputs_give_the_same_bytes(artifact, tmp_path):
    again = export(tiny(), None, tmp_path / "again")
    assert again.files == manifest.read(artifact).files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear": plan.WeightScheme(bits=4, group_size=48)}, "q_proj.weight has groups of 48.*use one of those"),
        ({"linear": plan.WeightScheme(bits=4, group_size=8)}, "groups of 8"),
        ({"linear": plan.WeightScheme(bits=4, group_size=512)}, "groups of 512"),
        ({"shape": {"hidden_size": 264}}, "embed_tokens.weight is per channel with 264 input features"),
        ({"shape": {"head_dim": 24}}, "head_dim 24.*executorch-xnnpack"),
        ({"activations": "int8-per-token"}, "activations is 'int8-per-token'.*set it to none"),
    ],
)
def test_plans_that_onnxruntime_does_not_support_are_refused_before_any_work(change, message):
    p = tiny(linear=change.get("linear"))
    architecture = p.model.architecture.model_copy(update=change.get("shape", {}))
    if "activations" in change:
        p = p.model_copy(update={"target": p.target.model_copy(update={"activations": change["activations"]})})
    with pytest.raises(ExportError, match=message):
        onnx_kv.check(p, architecture)
