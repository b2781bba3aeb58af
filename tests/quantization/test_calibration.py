"""Calibrated rounding: what it minimizes, that it goes on where it was interrupted, and that it helps on other text."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export import checkpoints, quantization
from export.architecture import EMBEDDING, HEAD
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host import processor
from export.model import attend
from export.plan import CalibrationText, Gptq, Mixture, Promotion, QuantRecipe, WeightScheme, load_plan
from export.quantization import calibration, gptq, layerwise, processors
from export.quantization.eager import eager
from export.quantization.gptq import Moments, choose_integers, inverse_factor, round_linears, target
from export.quantization.nearest import SMALLEST_SCALE, best_scales, round_to_nearest
from export.quantization.spread import exact_products, products_in
from export.quantization.store import Unfinished
from export.toolbox import synth

GROUPS, CHANNELS = WeightScheme(bits=4, group_size=32), WeightScheme(bits=8, group_size=None)
TEXT = Mixture(
    name="test",
    description="English and code",
    length=64,
    held_out_every=8,
    texts=(CalibrationText(file="prose.txt", windows=27), CalibrationText(file="code.txt", windows=9)),
    generated=None,
)
PROMOTION = {"scheme": CHANNELS.model_dump(), "windows": 6, "linear_bits_per_weight": 6.0}
GPTQ = Gptq(damping=0.01)


def weight(rows=48, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns=128, count=4000, seed=1):
    """Inputs [count, K] whose channels go together, as those of a real layer do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, columns, generator=generator)
    return torch.randn(count, 12, generator=generator) @ mix + 0.3 * torch.randn(count, columns, generator=generator)


def moments_of(w, x, y=None, drift=0.0):
    """Of linears that read y in the quantized model and x in the full one, which is ahead by `drift` besides."""
    y = x if y is None else y
    return Moments(y.T @ y, ((x - y) @ w.T + drift).T @ y)


def aimed(w, moments, damping):
    """`target` with the columns in an order of their own."""
    order, strength = torch.arange(w.shape[1]).roll(5), damping * moments.inputs.diagonal().mean()
    return target(w, moments.lost, order, inverse_factor(moments.inputs[order][:, order], strength))


def error(rounded, w, x):
    return float(((rounded.dequantized() - w) @ x.T).square().sum())


def test_with_inputs_that_tell_nothing_apart_integers_are_the_nearest():
    w, scale = weight(), torch.full((48, 4), 0.25)
    integers = choose_integers(w, scale, torch.arange(128), inverse_factor(torch.eye(128), 0.01), GROUPS)
    torch.testing.assert_close(integers, (w / 0.25).round().clamp(-8, 7).to(torch.int8))


def test_what_the_layer_computes_is_closer_than_with_the_nearest_integers():
    w, x = weight(), correlated()
    (rounded,) = round_linears([w], [GROUPS], moments_of(w, x), GPTQ)
    assert error(rounded, w, x) < 0.5 * error(round_to_nearest(w, GROUPS), w, x)


def test_rows_that_share_inputs_are_rounded_as_each_alone():
    w, x = weight(), correlated()
    both = round_linears([w[:16], w[16:]], [GROUPS, GROUPS], moments_of(w, x), GPTQ)
    alone = round_linears([w[16:]], [GROUPS], moments_of(w[16:], x), GPTQ)
    assert torch.equal(both[1].scale, alone[0].scale)
    assert (both[1].qdata == alone[0].qdata).float().mean() > 0.99


def test_linears_with_one_input_may_have_two_schemes():
    w, x = weight(), correlated()
    parts, schemes = [w[:8], w[8:24], w[24:]], [GROUPS, CHANNELS, GROUPS]
    rounded = round_linears(parts, schemes, moments_of(w, x), GPTQ)
    assert [linear.scale.shape for linear in rounded] == [(8, 4), (16, 1), (24, 4)]
    assert [bool((linear.qdata.abs() > 8).any()) for linear in rounded] == [False, True, False]
    assert error(rounded[1], parts[1], x) < 0.02 * error(rounded[2], parts[2], x)


def test_scales_are_positive_bfloat16_and_weigh_errors():
    w, importance = weight(), correlated().square().sum(0)
    scale = best_scales(w, importance, GROUPS)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert float(scale.min()) >= SMALLEST_SCALE

    def cost(s):
        wide = s.repeat_interleave(32, 1)
        return float((((w / wide).round().clamp(-8, 7) * wide - w).square() * importance).sum())

    assert cost(scale) < cost(round_to_nearest(w, GROUPS).scale)
    assert float(best_scales(torch.zeros(2, 64), torch.ones(64), GROUPS).min()) >= SMALLEST_SCALE


def test_the_target_undoes_what_the_inputs_have_lost():
    """Inputs that are scaled down want weights that are scaled up; a drift behind wants to be made up for."""
    w, x = weight(), correlated()
    torch.testing.assert_close(aimed(w, moments_of(w, x), 1e-6), w, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(aimed(w, moments_of(w, x, x * 0.5), 1e-6), 2 * w, atol=3e-2, rtol=1e-2)
    behind = torch.randn(48, 128, generator=torch.Generator().manual_seed(5))
    caught = aimed(w, moments_of(w, x, drift=x @ behind.T), 1e-6)
    torch.testing.assert_close(caught, w + behind, atol=3e-2, rtol=1e-2)
    torch.testing.assert_close(aimed(w, moments_of(w, x, x * 0.5), 1e6), w, atol=1e-2, rtol=1e-2)


def test_the_factor_is_of_the_inverse_whatever_the_number_of_blocks(monkeypatch):
    x = correlated(columns=200)
    monkeypatch.setattr(gptq, "_FACTORED", 64)
    factor = inverse_factor(x.T @ x, torch.tensor(4.0))
    assert torch.equal(factor, factor.triu())
    inverse = (x.T @ x + 4 * torch.eye(200)).double().inverse().float()
    torch.testing.assert_close(factor.T @ factor, inverse, atol=1e-5, rtol=1e-3)


def test_inputs_that_say_nothing_leave_the_nearest_integers():
    """All of them are zero, as behind a layer whose weights are."""
    (rounded,) = round_linears([weight()], [GROUPS], Moments(torch.zeros(128, 128), torch.zeros(48, 128)), GPTQ)
    assert float((rounded.dequantized() - weight()).abs().max()) < float(rounded.scale.max())


def test_inputs_that_are_no_numbers_have_no_factor():
    broken = moments_of(weight(), correlated())
    broken.inputs[3, 3] = -1e9
    with pytest.raises(torch.linalg.LinAlgError):
        round_linears([weight()], [GROUPS], broken, Gptq(damping=0.01))


@pytest.fixture(scope="module")
def plan():
    nearest = load_plan("tiny", "int4-g32", "onnx-cpu")
    fields = {"method": "gptq", "calibration": TEXT, "gptq": GPTQ}
    return nearest.model_copy(update={"quant": nearest.quant.model_copy(update=fields)})


@pytest.fixture(scope="module")
def opened(plan):
    return checkpoints.load(plan.model, None)


@pytest.fixture(scope="module")
def calibrated(plan, opened, tmp_path_factory):
    return quantization.quantize(opened, plan.quant, tmp_path_factory.mktemp("cache"))


def assert_same(model, expected):
    """Integers and scales, to the bit, and what was noted about them."""
    ours, theirs = load_file(model.store), load_file(expected.store)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.layers == expected.layers


def ids_of(opened, mixture):
    return calibration.tokens(opened, mixture, Unfinished(Path("/nowhere")), "cpu")


def divergence(opened, model):
    """Mean KL to the float model on text it was not calibrated with."""
    ids = ids_of(opened, TEXT.model_copy(update={"texts": (CalibrationText(file="maths.txt", windows=8),)}))
    with torch.no_grad():
        full, _ = eager(reader(opened), opened.architecture, "none")(ids)
        ours, _ = eager(model.read, opened.architecture, "none")(ids)
    p, q = full.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def reader(opened):
    tied = opened.architecture.tie_word_embeddings
    return lambda name: opened.read(EMBEDDING if tied and name == HEAD else name)


def test_it_loses_less_than_rounding_to_nearest(plan, opened, calibrated, tmp_path):
    nearest = quantization.quantize(opened, load_plan("tiny", "int4-g32", "onnx-cpu").quant, tmp_path)
    assert divergence(opened, calibrated) < 0.8 * divergence(opened, nearest)


def test_every_tensor_of_the_recipe_is_there_once(plan, opened, calibrated):
    assert [layer.name for layer in calibrated.layers] == calibrated.schemes.names


def test_the_same_inputs_give_the_same_bytes(plan, opened, calibrated, tmp_path):
    again = quantization.quantize(opened, plan.quant, tmp_path)
    assert_same(again, calibrated)


@pytest.mark.parametrize("method", ["gptq", "scales", "promotion"])
def test_integers_do_not_depend_on_the_number_of_cores(plan, opened, tmp_path, monkeypatch, method):
    fields = {
        "gptq": {},
        "scales": {"method": "scales", "gptq": None},
        "promotion": {"promotion": Promotion.model_validate(PROMOTION)},
    }
    recipe = plan.quant.model_copy(update=fields[method])
    stores = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(processor, "usable", lambda cores=cores: cores)
        (folder := tmp_path / str(cores)).mkdir()
        stores.append(quantization.quantize(opened, recipe, folder))
    assert_same(stores[1], stores[0])
    assert_same(stores[2], stores[0])


def test_models_in_bfloat16_lead_to_no_more_loss(plan, opened, tmp_path, monkeypatch):
    losses, recipe = [], plan.quant.model_copy(update={"gptq": Gptq(damping=0.5)})  # as configs/quant has it
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(processors, "computing_in", lambda _, dtype=dtype: dtype)
        (folder := tmp_path / str(dtype)).mkdir()
        losses.append(divergence(opened, quantization.quantize(opened, recipe, folder)))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_an_interrupted_run_goes_on_where_it_was(plan, opened, calibrated, tmp_path, monkeypatch):
    rounded = []

    def interrupted(weights, *args):
        if len(rounded) == 5:
            raise KeyboardInterrupt
        rounded.append(len(weights))
        return round_linears(weights, *args)

    monkeypatch.setattr(layerwise, "round_linears", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantization.quantize(opened, plan.quant, tmp_path)
    (folder,) = tmp_path.glob("*.unfinished")
    files = sorted(folder.iterdir())
    assert len(files) == sum(rounded)
    files[0].write_bytes(b"damaged")  # is rounded again, with what shares its inputs
    monkeypatch.setattr(layerwise, "round_linears", lambda *args: rounded.append(0) or round_linears(*args))
    resumed = quantization.quantize(opened, plan.quant, tmp_path)
    assert_same(resumed, calibrated)
    assert rounded.count(0) == 2 * 4 - 5 + 1
    assert not folder.exists()


def test_other_text_is_another_model(plan, opened):
    fewer = TEXT.model_copy(update={"texts": TEXT.texts[:1]})
    other = plan.quant.model_copy(update={"calibration": fewer})
    assert quantization.content_key(opened, plan.quant, None) != quantization.content_key(opened, other, None)


def test_the_text_itself_is_part_of_the_key(plan, opened, monkeypatch, tmp_path):
    before = quantization.content_key(opened, plan.quant, None)
    for text in TEXT.texts:
        (tmp_path / text.file).write_text("other words " * 2000)
    monkeypatch.setattr("export.quantization.texts.TEXT", tmp_path)
    assert quantization.content_key(opened, plan.quant, None) != before


@pytest.mark.parametrize(
    ("file", "windows", "message"),
    [
        ("prose.txt", 100_000, r"prose\.txt of .* tokens is too short for 100000"),
        ("nowhere.txt", 1, r"nowhere\.txt: missing; a mixture in configs/mixtures"),
    ],
)
def test_text_that_is_missing_or_too_short_is_named(plan, opened, tmp_path, file, windows, message):
    texts = (CalibrationText(file=file, windows=windows),)
    recipe = plan.quant.model_copy(update={"calibration": TEXT.model_copy(update={"texts": texts})})
    with pytest.raises(ExportError, match=message):
        quantization.quantize(opened, recipe, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "gptq"}, "contradicts calibration"),
        ({"method": "scales"}, "contradicts calibration"),
        ({"method": "gptq", "calibration": TEXT.model_dump()}, "contradicts gptq"),
        ({"method": "rtn", "calibration": TEXT.model_dump()}, "contradicts calibration"),
        ({"method": "scales", "calibration": TEXT.model_dump(), "gptq": GPTQ.model_dump()}, "contradicts gptq"),
        ({"method": "scales", "calibration": TEXT.model_dump(), "linear": None}, "needs a scheme for linear"),
        ({"promotion": PROMOTION}, "promotion needs method gptq"),
        (
            {
                "method": "gptq",
                "calibration": TEXT.model_dump(),
                "gptq": GPTQ.model_dump(),
                "promotion": {**PROMOTION, "scheme": GROUPS.model_dump()},
            },
            "must give more bits",
        ),
        ({"promotion": {**PROMOTION, "max_kl": 0.1}}, "Extra inputs are not permitted"),
        ({"promotion": {**PROMOTION, "linear_bits_per_weight": None}}, "should be a valid number"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(plan, fields, message):
    rtn = load_plan("tiny", "int4-g32", "onnx-cpu").quant.model_dump()
    with pytest.raises(ValueError, match=message):
        QuantRecipe.model_validate({**rtn, **fields})


def test_calibration_text_is_not_evaluated_and_the_other_way_round():
    from export.quantization import texts
    from runtime_tests.evaluation import TEXT as EVALUATED

    pairs = [("prose.txt", "wikitext2.txt"), ("maths.txt", "mgsm/en.txt"), ("code.txt", "code.txt")] + [
        (f"udhr/{p.name}", f"udhr/{p.name}") for p in (EVALUATED / "udhr").iterdir()
    ]
    for ours, theirs in pairs:
        text = texts.read(ours)
        lines = [line for line in (EVALUATED / theirs).read_text(encoding="utf-8").splitlines() if len(line) > 60]
        assert not [line for line in lines if line in text]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_layers_are_computed_as_the_model_computes_them(opened, monkeypatch, dtype, tolerance):
    """The walk without rounding is the model."""
    a, ids = opened.architecture, torch.arange(100)[None]
    stream = torch.nn.functional.embedding(ids, opened.read(EMBEDDING))
    streams = layerwise.Streams(stream.clone(), stream.clone())

    class Exact:
        def __init__(self, weight):
            self.weight = weight

        def dequantized(self):
            return self.weight

    monkeypatch.setattr(layerwise, "round_linears", lambda weights, *_: [Exact(weight) for weight in weights])
    task = layerwise.Task(defaultdict(lambda: GROUPS), GPTQ, calibrating=1, rounded_before=lambda _: None, dtype=dtype)
    with torch.inference_mode():
        names = [name for name, _ in layerwise.round_layers(opened.read, a, task, streams)]
        model = eager(reader(opened), a, "none")
        logits, _ = model(ids)
        ours = model.lm_head(model.model.norm(streams.quantized))
    assert names == list(a.linear_shapes())
    torch.testing.assert_close(ours, logits, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("heads", "groups", "length"), [(9, 3, 200), (4, 4, 64), (8, 2, 1)])
def test_attention_in_bfloat16_is_as_near_as_torchs(heads, groups, length):
    generator = torch.Generator().manual_seed(0)

    def drawn(count):
        return torch.randn(2, length, count, 64, generator=generator).transpose(1, 2).bfloat16() * 2

    q, k, v = drawn(heads), drawn(groups), drawn(groups)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    exact = attend(q.double(), k.double(), v.double(), causal)
    with products_in(torch.bfloat16):
        ours = layerwise.attend_in_bfloat16(q, k, v, causal)
    assert ours.dtype == torch.bfloat16
    errors = [float((y.double() - exact).square().mean()) for y in (ours, attend(q, k, v, causal))]
    assert errors[0] <= 1.1 * errors[1]


def test_products_of_bfloat16_numbers_are_exact_and_the_setting_ends_with_them():
    x, settings = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.backends.mkldnn
    before = settings.matmul.fp32_precision
    with products_in(torch.bfloat16):
        assert settings.matmul.fp32_precision == "bf16"
        ours = (x.float().T @ x.float()).double()
    assert settings.matmul.fp32_precision == before
    torch.testing.assert_close(ours, x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact_products_round_no_number(dtype):
    x = torch.randn(2048, 256, generator=torch.Generator().manual_seed(0))
    with exact_products(dtype):
        ours = (x.T @ x).double()
    torch.testing.assert_close(ours, x.double().T @ x.double(), rtol=1e-5, atol=4e-3)
    rounded = x.bfloat16().double()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rounded.T @ rounded, x.double().T @ x.double(), rtol=1e-5, atol=4e-3)


def test_noise_of_one_step_takes_the_weights_off_their_grid():
    steps = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(3))
    steps[:, ::32], steps[:, 1::32] = 0, 15
    weight = 0.25 * steps - 1
    dithered = synth.dithered(weight, torch.Generator().manual_seed(0))
    difference = dithered - weight
    assert float(difference.abs().max()) <= 0.125
    assert float(difference.abs().mean()) == pytest.approx(0.0625, rel=0.2)
    assert torch.equal(dithered, synth.dithered(weight, torch.Generator().manual_seed(0)))
    assert not torch.equal(dithered, synth.dithered(weight, torch.Generator().manual_seed(1)))


def test_a_dithered_checkpoint_is_one(opened, tmp_path):
    synth.write_dithered(opened, tmp_path, seed=0)
    again = checkpoints.load(load_plan("tiny", "int4-g32", "onnx-cpu").model, parse_origin(str(tmp_path)))
    assert again.architecture == opened.architecture
    for name in opened.architecture.tensor_shapes():
        same = torch.equal(again.read(name), opened.read(name))
        assert same == ("norm" in name), name
