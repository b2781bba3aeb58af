"""GPTQ-format folders: dequantized as AutoGPTQ does, legal integers taken as they are, damaged ones named."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export import checkpoints, quantization
from export.checkpoints.origin import parse_origin
from export.pipeline import export
from export.plan import WeightScheme, load_plan
from export.quantization.nearest import round_to_nearest
from tests.support import harms
from tests.support.checkpoints import LLAMA, SMALL, TOKENIZER_FILES, packed, refusal, weights, write_gptq
from tests.support.harms import set_quantization

LINEARS = list(SMALL.linear_shapes())
LINEAR = "model.layers.0.mlp.up_proj"
RECIPE = load_plan("tiny", "int4-g32", "onnx-cpu").quant


def in_order(columns, group):
    return torch.arange(columns) // group


def symmetric(bits=4, group=32, *, scales=torch.float16, architecture=SMALL):
    """Every linear from another quantizer: symmetric, adjacent columns in a group, scales that bf16 cannot hold."""
    linears = {}
    for name in architecture.linear_shapes():
        weight = weights(architecture)[name]
        step = weight.unflatten(1, (-1, group)).abs().amax(-1) / (2 ** (bits - 1) - 0.5)
        step = step.to(scales)
        wide = step.float().repeat_interleave(group, 1)
        codes = (weight / wide).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
        zeros = torch.full(step.shape, 2 ** (bits - 1))
        linears[name] = (codes.int(), zeros, step, in_order(weight.shape[1], group))
    return linears


def drawn(bits=4, group=32, *, seed=0, sym=False, shuffled=True):
    """Every linear with any codes and zero points, columns in any group."""
    generator = torch.Generator().manual_seed(seed)
    linears = {}
    for name, (rows, columns) in SMALL.linear_shapes().items():
        groups = -(-columns // group)
        draw = lambda *shape: torch.randint(0, 2**bits, shape, generator=generator)  # noqa: E731
        zeros = torch.full((rows, groups), 2 ** (bits - 1)) if sym else draw(rows, groups)
        order = torch.randperm(columns, generator=generator) if shuffled else torch.arange(columns)
        scales = torch.rand(rows, groups, generator=generator).half() / 100 + 0.001
        linears[name] = (draw(rows, columns), zeros, scales, order // group)
    return linears


def dequantized(codes, zeros, scales, groups):
    """Column by column, by the definition."""
    weight = torch.empty(codes.shape)
    for k, group in enumerate(groups.tolist()):
        weight[:, k] = scales[:, group].float() * (codes[:, k] - zeros[:, group])
    return weight


def quantized(folder, cache, **recipe):
    opened = checkpoints.load(LLAMA, parse_origin(str(folder)))
    return quantization.quantize(opened, RECIPE.model_copy(update=recipe), cache)


def line_of(model):
    return quantization.from_checkpoint(model.layers)


# ── what is read ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shuffled", [True, False], ids=["desc_act", "in order"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 24), (8, 64), (4, -1)])
@pytest.mark.parametrize("version", [1, 2])
def test_a_weight_is_scale_times_code_less_zero(tmp_path, version, bits, group, shuffled):
    linears = drawn(bits, 128 if group == -1 else group, shuffled=shuffled)
    opened = checkpoints.load(LLAMA, parse_origin(str(write_gptq(tmp_path / "gptq", linears, version=version, bits=bits,
                                                   group_size=group))))  # fmt: skip
    for name, parts in linears.items():
        assert torch.equal(opened.read(name), dequantized(*parts)), name
    words = "one group a row" if group == -1 else f"groups of {group}"
    assert opened.source.description == f"Hugging Face folder, GPTQ int{bits}, {words}, all 7 linears"


def test_no_g_idx_and_settings_in_a_file_of_their_own(tmp_path):
    linears = drawn(shuffled=False)
    folder = write_gptq(tmp_path / "gptq", linears)
    tensors = load_file(folder / "model.safetensors")
    save_file({key: t for key, t in tensors.items() if "g_idx" not in key}, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(
        json.dumps(fields.pop("quantization_config") | {"quant_method": "gptq"})
    )
    (folder / "config.json").write_text(json.dumps(fields))
    opened = checkpoints.load(LLAMA, parse_origin(str(folder)))
    assert all(torch.equal(opened.read(name), dequantized(*parts)) for name, parts in linears.items())
    assert set(opened.sha256) == {"config.json", "quantize_config.json", "model.safetensors", *TOKENIZER_FILES}


def test_a_wrong_zero_point_would_be_seen(tmp_path):
    """The negative twin: read as the other version of the format, it is a different weight."""
    linears = drawn(shuffled=False)
    folder = write_gptq(tmp_path / "gptq", linears)
    set_quantization(folder, checkpoint_format="gptq_v2")
    assert not torch.equal(
        checkpoints.load(LLAMA, parse_origin(str(folder))).read(LINEARS[0]), dequantized(*linears[LINEARS[0]])
    )


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_integers_are_kept_and_only_their_scales_are_rounded(tmp_path):
    linears = symmetric()
    model = quantized(write_gptq(tmp_path / "gptq", linears), tmp_path)
    for name, (codes, _, scales, _) in linears.items():
        weight = model.read(name)
        assert torch.equal(weight.qdata, (codes - 8).to(torch.int8)), name
        assert torch.equal(weight.scale, scales.bfloat16().float()), name
    infos = {layer.name: layer for layer in model.layers}
    assert {name for name, info in infos.items() if info.kept} == set(LINEARS)
    assert all(info.sqnr_db > 50 for info in infos.values() if info.kept)
    assert line_of(model) == "kept the checkpoint's integers of 7 of 7 weights"


def test_rounding_again_would_lose(tmp_path):
    """The negative twin: rounded to nearest, the same weights are different integers, further from the checkpoint."""
    originals = drawn(sym=True, shuffled=False)
    narrow = {name: (codes.clamp(3, 13), *rest) for name, (codes, *rest) in originals.items()}  # no group reaches −8
    folder = write_gptq(tmp_path / "gptq", narrow)
    model, opened = quantized(folder, tmp_path), checkpoints.load(LLAMA, parse_origin(str(folder)))
    for name in LINEARS:
        again, kept = round_to_nearest(opened.read(name), RECIPE.linear), model.read(name)
        assert not torch.equal(again.qdata, kept.qdata)
        assert next(layer.sqnr_db for layer in model.layers if layer.name == name) > again.sqnr_db + 10


@pytest.mark.parametrize("group", [64, -1])
def test_larger_groups_fit_by_repeating_their_scales(tmp_path, group):
    linears = {name: parts for name, parts in symmetric(group=64).items() if parts[0].shape[1] == 64}
    model = quantized(write_gptq(tmp_path / "gptq", linears, group_size=group), tmp_path)
    for name, (codes, _, scales, _) in linears.items():
        assert torch.equal(model.read(name).qdata, (codes - 8).to(torch.int8))
        assert torch.equal(model.read(name).scale, scales.bfloat16().float().repeat_interleave(2, 1))
    assert line_of(model) == f"kept the checkpoint's integers of {len(linears)} of {len(linears)} weights"


def test_int8_per_channel_fits_int8_per_channel(tmp_path):
    linears = {name: parts for name, parts in symmetric(8, 64).items() if parts[0].shape[1] == 64}
    folder = write_gptq(tmp_path / "gptq", linears, bits=8, group_size=-1)
    model = quantized(folder, tmp_path, linear=WeightScheme(bits=8, group_size=None))
    for name, (codes, _, scales, _) in linears.items():
        assert torch.equal(model.read(name).qdata, (codes - 128).to(torch.int8))
        assert torch.equal(model.read(name).scale, scales.bfloat16().float())


def outlier(linears):
    """One scale too small for fp16 and bf16 alike."""
    linears[LINEARS[0]][2][0, 0] = 2e-6
    return linears


UNFIT = {
    "smaller groups": (symmetric, {}, {"linear": WeightScheme(bits=4, group_size=64)},
                       "groups of 32 do not fit recipe groups of 64"),
    "other bits": (symmetric, {}, {"linear": WeightScheme(bits=8, group_size=None)}, "4 bits do not fit a recipe of 8"),
    "zero points": (lambda: drawn(shuffled=False), {"sym": False}, {}, "zero points that are not the middle"),
    "order of columns": (lambda: drawn(sym=True), {"desc_act": True}, {},
                         "groups of columns that do not stand together (desc_act)"),
    "a short last group": (lambda: drawn(group=24, sym=True, shuffled=False), {"group_size": 24}, {},
                           "groups of 24 that do not divide 64 columns"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_integers_that_do_not_fit_are_rounded_like_any_weight(tmp_path, case):
    make, config, recipe, reason = UNFIT[case]
    folder = write_gptq(tmp_path / "gptq", make(), **config)
    model, opened = quantized(folder, tmp_path, **recipe), checkpoints.load(LLAMA, parse_origin(str(folder)))
    assert not any(layer.kept for layer in model.layers)
    assert line_of(model).startswith("kept the checkpoint's integers of 0 of 7 weights; not of ")
    assert reason in line_of(model)
    again = round_to_nearest(opened.read(LINEARS[0]), model.schemes.of(LINEARS[0]))
    assert torch.equal(model.read(LINEARS[0]).qdata, again.qdata)


def test_one_scale_that_fp16_cannot_hold_costs_one_weight(tmp_path):
    model = quantized(write_gptq(tmp_path / "gptq", outlier(symmetric())), tmp_path)
    assert line_of(model) == (
        "kept the checkpoint's integers of 6 of 7 weights; not of 1: scales outside 2^-17 … 65504"
    )


def test_a_method_that_calibrates_chooses_its_own(tmp_path):
    gptq = load_plan("tiny", "int4-g32-gptq", "onnx-cpu").quant
    few = {"length": 16, "texts": gptq.calibration.texts[:1], "held_out_every": 2, "generated": None}
    text = gptq.calibration.model_copy(update=few)
    folder = write_gptq(tmp_path / "gptq", symmetric())
    model = quantized(folder, tmp_path, method="scales", calibration=text)
    assert line_of(model) == (
        "kept the checkpoint's integers of 0 of 7 weights; not of 7: method scales chooses its own"
    )


def test_our_own_integers_come_back_bit_for_bit_in_an_artifact(tmp_path):
    """Quantized by us, written in GPTQ's format, built from that: the same integers and scales."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from export.formats.onnx_kv.weights import read_weights

    plan = load_plan("tiny", "int4-g32", "onnx-cpu")
    ours = quantization.quantize(checkpoints.load(plan.model, None), plan.quant, tmp_path)
    linears = {}
    for name in ours.architecture.linear_shapes():
        weight = ours.read(name)
        zeros = torch.full(weight.scale.shape, 8)
        assert torch.equal(weight.scale.half().float(), weight.scale)
        order = in_order(weight.qdata.shape[1], 32)
        linears[name] = (weight.qdata.int() + 8, zeros, weight.scale.half(), order)
    folder = write_gptq(tmp_path / "gptq", linears, architecture=ours.architecture)
    theirs = quantization.quantize(checkpoints.load(LLAMA, parse_origin(str(folder))), plan.quant, tmp_path)
    for name in linears:
        assert torch.equal(ours.read(name).qdata, theirs.read(name).qdata), name
        assert torch.equal(ours.read(name).scale, theirs.read(name).scale), name
    short = plan.model_copy(update={"model": LLAMA.model_copy(update={"context_length": 64})})
    built = export(short, parse_origin(str(folder)), tmp_path / "out")
    stored = {weight.name: weight for weight in read_weights(tmp_path / "out" / "model.onnx", ours.architecture)}
    for weight in (stored[name] for name in linears):
        np.testing.assert_array_equal(weight.qdata, ours.read(weight.name).qdata, err_msg=weight.name)
        np.testing.assert_array_equal(weight.scale, ours.read(weight.name).scale, err_msg=weight.name)
    line = "kept the checkpoint's integers of 14 of 14 weights"
    assert built.quantization.from_checkpoint == line
    assert f"| integers | {line} |" in (tmp_path / "out" / "README.md").read_text()


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_gptq(tmp_path_factory.mktemp("pristine") / "gptq", symmetric())


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "gptq")


def test_without_any_change_it_opens(folder):
    """The twin of the mistakes below."""
    assert set(checkpoints.load(LLAMA, parse_origin(str(folder))).source.shapes) == set(SMALL.tensor_shapes())


def put(suffix, change):
    return lambda t: t.update({LINEAR + suffix: change(t[LINEAR + suffix])})


def poke(suffix, value):
    def change(tensors):
        tensors[LINEAR + suffix].view(-1)[3] = value

    return change


BROKEN = {
    "qweight cut": (put(".qweight", lambda t: t[:-1]), f"{LINEAR}.g_idx is I32 [64], expected I32 [56]"),
    "qweight of fewer rows": (put(".qweight", lambda t: t[:, :-8]),
                              f"{LINEAR}.qzeros is I32 [2, 16], expected I32 [2, 15]"),
    "qweight wrong, all the rest with it": (
        lambda t: [put(".qweight", lambda x: x[:, :-8])(t), put(".qzeros", lambda x: x[:, :-1])(t),
                   put(".scales", lambda x: x[:, :-8])(t)],
        f"{LINEAR}.weight has shape [120, 64], the architecture needs [128, 64]",
    ),
    "qweight as floats": (put(".qweight", torch.Tensor.float), f"{LINEAR}.qweight is F32"),
    "qweight flat": (put(".qweight", torch.Tensor.flatten), f"{LINEAR}.qweight is I32 [1024], expected a matrix"),
    "no scales": (lambda t: t.pop(f"{LINEAR}.scales"), f"tensor {LINEAR}.scales is missing"),
    "no qzeros": (lambda t: t.pop(f"{LINEAR}.qzeros"), f"tensor {LINEAR}.qzeros is missing"),
    "no qweight": (lambda t: t.pop(f"{LINEAR}.qweight"), f"but {LINEAR}.qweight is missing"),
    "a weight beside it": (lambda t: t.update({f"{LINEAR}.weight": torch.ones(128, 64)}),
                           f"is there, and {LINEAR}.weight too"),
    "scales of other groups": (put(".scales", lambda t: t[:1]),
                               f"{LINEAR}.scales is F16 [1, 128], expected F16/BF16/F32 [2, 128]"),
    "scales as integers": (put(".scales", torch.Tensor.int), f"{LINEAR}.scales is I32"),
    "a NaN": (poke(".scales", float("nan")), f"{LINEAR}.scales holds NaN or infinity"),
    "an infinity": (poke(".scales", float("inf")), f"{LINEAR}.scales holds NaN or infinity"),
    "g_idx too large": (poke(".g_idx", 2), f"{LINEAR}.g_idx names a group outside 0 … 1"),
    "g_idx negative": (poke(".g_idx", -1), f"{LINEAR}.g_idx names a group outside 0 … 1"),
    "g_idx short": (put(".g_idx", lambda t: t[:-1]), f"{LINEAR}.g_idx is I32 [63], expected I32 [64]"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BROKEN)
def test_parts_that_do_not_fit_are_named(folder, mistake):
    change, words = BROKEN[mistake]
    harms.tensors(change)(folder)
    text = refusal(LLAMA, folder)
    assert any(word in text for word in words.split("|")), text
    assert text.startswith(str(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "bits: Input should be 4 or 8"),
        ({"bits": "4"}, "bits: '4' is unknown (did you mean 4?)"),
        ({"bits": 8}, "by qweight"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": None}, "group_size"),
        ({"group_size": 64}, "4 bits and group_size 64"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: 'marlin' is unknown (known: gptq, gptq_v2)"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"quant_method": "awq"}, "already quantized (quant_method 'awq')"),
    ],
)
def test_settings_that_are_not_read_or_say_otherwise(folder, change, words):
    set_quantization(folder, **change)
    assert words in refusal(LLAMA, folder)


def test_a_folder_without_packed_integers_that_says_gptq(folder):
    tensors = {name: w.half() for name, w in weights().items()}
    save_file(tensors | {"model.x": torch.ones(1).int()}, folder / "model.safetensors")  # floats alone would be read
    assert "says GPTQ, but no tensor is a qweight" in refusal(LLAMA, folder)


def test_the_writer_packs_lowest_bits_first():
    assert packed(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), 4).item() == 0x87654321 - 2**32
