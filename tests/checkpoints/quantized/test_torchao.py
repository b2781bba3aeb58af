"""Folders saved by transformers with a TorchAoConfig: read as torchao reads them, legal integers taken as they are."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, MappingType
from torchao.quantization.granularity import PerAxis, PerGroup

from export import checkpoints, quantization
from export.checkpoints.origin import parse_origin
from export.plan import WeightScheme, load_plan
from export.quantization.eager import eager_weights
from tests.support.checkpoints import LLAMA, SMALL, refusal, set_config, write_folder

LINEARS = list(SMALL.linear_shapes())
LINEAR = "model.layers.0.mlp.up_proj"
RECIPE = load_plan("tiny", "int4-g32", "onnx-cpu").quant


def config(bits=4, granularity=None, mapping=MappingType.SYMMETRIC):
    dtype = {3: torch.int3, 4: torch.int4, 8: torch.int8}[bits]
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity or PerGroup(32), mapping_type=mapping)


def write_torchao(tmp_path, how, dtype=torch.bfloat16, **options):
    """Quantized and saved by transformers."""
    from transformers import LlamaForCausalLM, TorchAoConfig

    write_folder(tmp_path / "float", dtype=dtype)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=TorchAoConfig(how, **options), device_map="cpu", dtype=dtype
    )
    model.save_pretrained(tmp_path / "torchao")
    shutil.copy(tmp_path / "float" / "tokenizer.json", tmp_path / "torchao")
    return tmp_path / "torchao"


def metadata(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.metadata()


def theirs(folder):
    """Every tensor as torchao puts it together."""
    tensors, left = unflatten_tensor_state_dict(load_file(folder / "model.safetensors"), metadata(folder))
    assert not left
    return tensors


def quantized(folder, cache, **recipe):
    return quantization.quantize(
        checkpoints.load(LLAMA, parse_origin(str(folder))), RECIPE.model_copy(update=recipe), cache
    )


KINDS = {
    "weight-only": config(),
    "dynamic activations": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    ),
    "asymmetric": config(mapping=MappingType.ASYMMETRIC),
    "int8 per channel": config(8, PerAxis(0)),
    "int3": config(3),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_what_torchao_dequantizes(tmp_path, kind, dtype):
    folder = write_torchao(tmp_path, KINDS[kind], dtype)
    opened, judge = checkpoints.load(LLAMA, parse_origin(str(folder))), theirs(folder)
    for name in LINEARS:
        assert torch.equal(opened.read(name).to(dtype), judge[name].dequantize()), name
    assert torch.equal(opened.read("model.norm.weight"), judge["model.norm.weight"].float())
    assert opened.source.description.endswith("all 7 linears")


@pytest.mark.parametrize(("kind", "scheme"), [
    ("weight-only", RECIPE.linear), ("dynamic activations", RECIPE.linear),
    ("int8 per channel", WeightScheme(bits=8, group_size=None)),
])  # fmt: skip
def test_symmetric_integers_are_kept(tmp_path, kind, scheme):
    folder = write_torchao(tmp_path, KINDS[kind])
    model, judge = quantized(folder, tmp_path, linear=scheme), theirs(folder)
    for name in LINEARS:
        assert torch.equal(model.read(name).qdata, judge[name].qdata), name
        assert torch.equal(model.read(name).scale, judge[name].scale.float()), name
    assert quantization.from_checkpoint(model.layers) == "kept the checkpoint's integers of 7 of 7 weights"


@pytest.mark.parametrize(("kind", "reason"), [
    ("asymmetric", "zero points that are not the middle"), ("int3", "3 bits do not fit a recipe of 4"),
    ("int8 per channel", "8 bits do not fit a recipe of 4"),
])  # fmt: skip
def test_others_are_not(tmp_path, kind, reason):
    model = quantized(write_torchao(tmp_path, KINDS[kind]), tmp_path)
    line = quantization.from_checkpoint(model.layers)
    assert line == f"kept the checkpoint's integers of 0 of 7 weights; not of 7: {reason}"


def test_our_own_quantized_model_comes_back_bit_for_bit(tmp_path):
    """Flattened by torchao: int4 linears and the int8 embedding."""
    plan = load_plan("tiny", "int4-g32", "onnx-cpu")
    ours = quantization.quantize(checkpoints.load(plan.model, None), plan.quant, tmp_path)
    names = list(ours.architecture.tensor_shapes())
    weights = dict(eager_weights(ours.read, ours.architecture, "none"))
    tensors, notes = flatten_tensor_state_dict({name: weights[name] for name in names})
    folder = write_folder(tmp_path / "torchao", ours.architecture)
    save_file(tensors, folder / "model.safetensors", notes)
    set_config(folder, quantization_config={"quant_method": "torchao"})
    model = quantized(folder, tmp_path)
    for name in ours.schemes.names:
        assert torch.equal(model.read(name).qdata, ours.read(name).qdata), name
        assert torch.equal(model.read(name).scale, ours.read(name).scale), name
    assert quantization.from_checkpoint(model.layers) == "kept the checkpoint's integers of 15 of 15 weights"


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_torchao(tmp_path_factory.mktemp("pristine"), config())


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "torchao")


def change_file(folder, change_tensors=lambda tensors: None, change_notes=lambda notes: None):
    tensors, notes = load_file(folder / "model.safetensors"), metadata(folder)
    change_tensors(tensors)
    change_notes(notes)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors",
              notes)  # fmt: skip


def test_without_any_change_it_opens(folder):
    """The twin of the mistakes below."""
    change_file(folder)
    assert set(checkpoints.load(LLAMA, parse_origin(str(folder))).source.shapes) == set(SMALL.tensor_shapes())


QDATA, SCALE, ZERO = (f"{LINEAR}._weight_{part}" for part in ("qdata", "scale", "zero_point"))
BROKEN = {
    "no scale": (lambda t: t.pop(SCALE), f"tensor {SCALE} is missing"),
    "no qdata": (lambda t: t.pop(QDATA), f"tensor {QDATA} is missing"),
    "qdata cut": (lambda t: t.update({QDATA: t[QDATA][:-1]}), f"{SCALE} has shape [128, 2], expected [127, 2]"),
    "qdata narrow": (lambda t: t.update({QDATA: t[QDATA][:, :-1]}), f"{QDATA} is [128, 63], which blocks of [1, 32]"),
    "qdata as floats": (lambda t: t.update({QDATA: t[QDATA].float()}), f"{QDATA} is F32"),
    "scale of other groups": (lambda t: t.update({SCALE: t[SCALE][:, :1]}), f"{SCALE} has shape [128, 1]"),
    "zero points flat": (lambda t: t.update({ZERO: t[ZERO].flatten()}), f"{ZERO} is I8 [256], expected a matrix"),
    "a NaN": (lambda t: t[SCALE].fill_(torch.nan), f"{SCALE} holds NaN or infinity"),
    "five bits": (lambda t: t[QDATA].fill_(8), f"{QDATA} holds numbers outside int4"),
    "nobody's scale": (lambda t: t.update({"model.x._weight_scale": torch.ones(1)}), "no metadata describes model.x"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_parts_that_do_not_fit_are_named(folder, mistake):
    change, words = BROKEN[mistake]
    change_file(folder, change)
    text = refusal(LLAMA, folder)
    assert words in text
    assert text.startswith(str(folder))


def note(**fields):
    """A change of one weight's metadata."""

    def change(notes):
        entry = json.loads(notes[f"{LINEAR}.weight"])
        notes[f"{LINEAR}.weight"] = json.dumps({**entry, **fields} if "_type" in fields else
                                               {**entry, "_data": entry["_data"] | fields})  # fmt: skip

    return change


NOTES = {
    "another type": (note(_type="Int4Tensor"), "is of torchao's type 'Int4Tensor'"),
    "no block size": (note(block_size=None), "block_size"),
    "a block of rows": (note(block_size=[2, 32]), "which blocks of [2, 32] do not divide"),
    "other bits": (note(target_dtype={"_type": "torch.dtype", "_data": "float8"}), "target_dtype._data"),
    "no JSON": (lambda n: n.update({f"{LINEAR}.weight": "{"}), f"metadata of {LINEAR}.weight is not valid JSON"),
    "a list": (lambda n: n.update({f"{LINEAR}.weight": "[]"}), "is of torchao's type None"),
    "one forgotten": (lambda n: n.pop(f"{LINEAR}.weight"), f"no metadata describes {LINEAR}.weight"),
    "none": (dict.clear, "no file's metadata describes a quantized tensor"),
}


@pytest.mark.parametrize("mistake", NOTES)
def test_metadata_that_is_not_read_is_named(folder, mistake):
    change, words = NOTES[mistake]
    change_file(folder, change_notes=change)
    assert words in refusal(LLAMA, folder)
