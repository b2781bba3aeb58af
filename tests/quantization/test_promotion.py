"""Mixed precision: the estimate of what each linear costs, the choice under a budget, and artifacts that hold it."""

from pathlib import Path

import pytest
import torch

from export import checkpoints, manifest, quantization
from export.architecture import EMBEDDING
from export.errors import ExportError
from export.manifest import Candidate
from export.model import RMSNorm
from export.plan import CalibrationText, Gptq, Mixture, Promotion, WeightScheme, load_plan
from export.quantization import calibration, schemes, sensitivity
from export.quantization.eager import eager
from export.quantization.nearest import round_at_best_scales, round_to_nearest
from export.quantization.store import Unfinished
from runtime_tests.checks import weights
from runtime_tests.jobs import WeightsJob
from runtime_tests.sessions import open_session

GROUPS, CHANNELS = WeightScheme(bits=4, group_size=32), WeightScheme(bits=8, group_size=None)
TEXT = Mixture(
    name="test",
    description="English and code",
    length=64,
    held_out_every=6,
    texts=(CalibrationText(file="prose.txt", windows=18), CalibrationText(file="code.txt", windows=6)),
    generated=None,
)


def promotion(bits):
    return Promotion(scheme=CHANNELS, windows=6, linear_bits_per_weight=bits)


def mixed(plan, bits=None):
    fields = {
        "method": "gptq",
        "calibration": TEXT,
        "gptq": Gptq(damping=0.01),
        "promotion": promotion(bits) if bits else None,
    }
    return plan.quant.model_copy(update=fields)


@pytest.fixture(scope="module")
def plan():
    return load_plan("tiny", "int4-g32", "onnx-cpu")


@pytest.fixture(scope="module")
def opened(plan):
    return checkpoints.load(plan.model, None)


@pytest.fixture(scope="module")
def six_bits(plan, opened, tmp_path_factory):
    return quantization.quantize(opened, mixed(plan, 6.0), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sensitivities(plan, opened):
    """On many windows, so that the draw of tokens matters little."""
    ids = calibration.tokens(opened, TEXT, Unfinished(Path("/nowhere")), "cpu")
    norm = RMSNorm(256, opened.architecture.rms_norm_eps)
    norm.weight = torch.nn.Parameter(opened.read("model.norm.weight"), requires_grad=False)
    table = opened.read(EMBEDDING)
    streams = list(torch.nn.functional.embedding(ids, table).split(1))
    head = sensitivity.Head(norm, table)
    return ids, dict(sensitivity.measure(opened.read, opened.architecture, head, streams, (GROUPS, CHANNELS)))


def measured_kl(opened, ids, name, scheme):
    """Mean KL with one linear rounded as the estimate assumes, all positions."""
    read = lambda weight: opened.read(EMBEDDING if weight == "lm_head.weight" else weight)  # noqa: E731
    with torch.no_grad():
        model = eager(read, opened.architecture, "none")
        full = model(ids)[0].double().log_softmax(-1)
        linear = model.get_submodule(name.removesuffix(".weight"))
        inputs = []
        hook = linear.register_forward_hook(lambda _module, x, _y: inputs.append(x[0].flatten(0, 1)))
        model(ids)
        hook.remove()
        rounded = round_at_best_scales(linear.weight.detach(), torch.cat(inputs).square().sum(0), scheme).dequantized()
        linear.weight = torch.nn.Parameter(rounded, requires_grad=False)
        other = model(ids)[0].double().log_softmax(-1)
    return float((full.exp() * (full - other)).sum(-1).mean())


def test_the_estimate_is_the_loss_of_rounding_that_linear_alone(opened, sensitivities):
    ids, estimates = sensitivities
    assert estimates.keys() == opened.architecture.linear_shapes().keys()
    for name in list(estimates)[::3]:
        measured = measured_kl(opened, ids, name, GROUPS)
        assert measured / 2.5 < estimates[name].kl < 1.5 * measured, name  # errors at several positions may add up


def test_more_bits_lose_a_small_part(sensitivities):
    _, estimates = sensitivities
    assert all(linear.promoted_kl < 0.05 * linear.kl for linear in estimates.values())


def candidates(*costs):
    return [
        Candidate(name=f"l{i}", kl=kl, promoted_kl=0.0, extra_bytes=size, promoted=False)
        for i, (kl, size) in enumerate(costs)
    ]


def test_what_saves_most_per_byte_is_promoted_first(plan, opened, sensitivities):
    base = schemes.of_recipe(plan.quant, opened.architecture)
    ranked = sensitivity.ranked(sensitivities[1], base, promotion(6.0))
    gains = [(linear.kl - linear.promoted_kl) / linear.extra_bytes for linear in ranked]
    assert gains == sorted(gains, reverse=True)
    sizes = {linear.name: linear.extra_bytes for linear in ranked}
    assert sizes["model.layers.0.self_attn.q_proj.weight"] == 256 * 256 * (8 + 16 / 256 - 4.5) / 8


def test_a_linear_that_no_longer_fits_makes_room_for_a_smaller_one():
    assert sensitivity.affordable(candidates((9, 50), (8, 60), (7, 20)), 75) == ["l0", "l2"]
    assert sensitivity.affordable(candidates((9, 50)), 49) == []


def test_the_budget_is_used_and_not_exceeded(six_bits):
    chosen = {linear.name for linear in six_bits.calibration.candidates if linear.promoted}
    shapes = six_bits.architecture.linear_shapes()
    weights = sum(torch.Size(shape).numel() for shape in shapes.values())
    bits = sum(torch.Size(s).numel() * schemes.bits_each(six_bits.schemes.of(n), s[-1]) for n, s in shapes.items())
    assert 5.7 < bits / weights <= 6.0
    assert len(six_bits.calibration.candidates) == len(shapes)
    assert chosen == {layer.name for layer in six_bits.layers if layer.name in shapes and layer.bits == 8}
    assert 0 < len(chosen) < len(shapes)
    smallest = min(linear.extra_bytes for linear in six_bits.calibration.candidates if not linear.promoted)
    assert smallest > (6.0 - bits / weights) * weights / 8


def test_it_loses_less_than_without_promotion(plan, opened, six_bits, tmp_path):
    plain = quantization.quantize(opened, mixed(plan), tmp_path)
    assert six_bits.calibration.held_out_kl < 0.9 * plain.calibration.held_out_kl
    assert plain.calibration.candidates == ()


def test_the_loss_on_held_out_windows_is_the_models(opened, six_bits):
    ids = calibration.tokens(opened, TEXT, Unfinished(Path("/nowhere")), "cpu")
    _, held_out = calibration.split(ids, TEXT.held_out_every)
    read = lambda name: opened.read(EMBEDDING if name == "lm_head.weight" else name)  # noqa: E731
    with torch.no_grad():
        p = eager(read, opened.architecture, "none")(held_out)[0].log_softmax(-1)
        q = eager(six_bits.read, opened.architecture, "none")(held_out)[0].log_softmax(-1)
    loss = float((p.exp() * (p - q)).sum(-1).mean())
    assert loss == pytest.approx(six_bits.calibration.held_out_kl, rel=4e-2)  # which may have been computed in bfloat16


def test_a_budget_no_choice_can_meet_is_refused_with_the_nearest(plan, opened, tmp_path):
    message = r"linear_bits_per_weight 4\.4 cannot be met: without any promotion it is 4\.5; give at least that"
    with pytest.raises(ExportError, match=message):
        quantization.quantize(opened, mixed(plan, 4.4), tmp_path)
    assert not list(tmp_path.glob("quantized-*.safetensors"))


def test_the_choice_of_an_interrupted_run_is_not_measured_again(plan, opened, six_bits, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "round_layers", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    recipe = mixed(plan, 6.0)
    with pytest.raises(KeyboardInterrupt):
        quantization.quantize(opened, recipe, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(sensitivity, "measure", lambda *_: pytest.fail("measured again"))
    assert quantization.quantize(opened, recipe, tmp_path).layers == six_bits.layers


def test_every_backend_is_asked_about_the_promoted_scheme(plan, opened):
    grouped = Promotion(scheme=WeightScheme(bits=8, group_size=32), windows=1, linear_bits_per_weight=6)
    recipe = mixed(plan).model_copy(update={"promotion": grouped})
    from export import formats

    pte = load_plan("tiny", "int4-g32", "executorch-xnnpack").model_copy(update={"quant": recipe})
    with pytest.raises(ExportError, match="XNNPACK has no int8 groups"):
        formats.load("pte").check(pte, opened.architecture)


def test_scales_for_what_is_computed_lose_less_than_nearest(plan, opened, tmp_path):
    searched = plan.quant.model_copy(update={"method": "scales", "calibration": TEXT})
    scales = quantization.quantize(opened, searched, tmp_path)
    plain = quantization.quantize(opened, plan.quant, tmp_path)
    gptq = quantization.quantize(opened, mixed(plan), tmp_path)
    ids = calibration.tokens(opened, TEXT, Unfinished(Path("/nowhere")), "cpu")
    held_out = calibration.split(ids, TEXT.held_out_every)[1]
    read = lambda name: opened.read(EMBEDDING if name == "lm_head.weight" else name)  # noqa: E731
    with torch.no_grad():
        p = eager(read, opened.architecture, "none")(held_out)[0].log_softmax(-1)
        losses = []
        for model in (plain, scales, gptq):
            q = eager(model.read, opened.architecture, "none")(held_out)[0].log_softmax(-1)
            losses.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert losses[0] > losses[1] > losses[2]


def test_nearest_of_the_scale_search_is_nearest():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    rounded = round_at_best_scales(w, torch.ones(64), GROUPS)
    wide = rounded.scale.repeat_interleave(32, 1)
    assert torch.equal(rounded.qdata, (w / wide).round().clamp(-8, 7).to(torch.int8))
    assert rounded.noise < round_to_nearest(w, GROUPS).noise


@pytest.mark.parametrize("target", ["onnx-cpu", "executorch-xnnpack", "coreml"])
def test_artifacts_hold_both_schemes_and_compute_with_them(tiny, store, target):
    folder = tiny(target, "int4-mixed")
    described = manifest.read(folder)
    job = WeightsJob(folder=str(folder), source=None, cache=str(store))
    comparison = weights.compare(job)
    assert (comparison["differing"], comparison["missing"]) == (0, [])
    linears = described.architecture.linear_shapes()
    bits = {layer.name: layer.bits for layer in described.quantization.layers if layer.name in linears}
    assert set(bits.values()) == {4, 8}
    assert {name for name, b in bits.items() if b == 8} == {
        linear.name for linear in described.quantization.calibration.candidates if linear.promoted
    }
    model = weights.rebuild(described, None, store)
    session = open_session(folder, described, threads=1)
    tokens = list(range(40, 72))
    got = torch.from_numpy(session.feed(tokens))
    session.close()
    with torch.no_grad():
        reference = eager(model.read, model.architecture, described.plan.target.activations)
        expected = reference(torch.tensor([tokens]))[0][0, -1]
    assert float((got - expected).norm() / expected.norm()) < 0.05
