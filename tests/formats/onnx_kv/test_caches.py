"""An int8 KV cache in GroupQueryAttention: its scales, its codes, and what they cost near and far."""

import dataclasses
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export import formats, manifest
from export.errors import ExportError
from export.formats import admission
from export.formats.onnx_kv import scales
from export.pipeline import export
from export.quantization.eager import eager
from tests.support.artifacts import reseal
from tests.support.metrics import eager_logits, forced_logits, mean_kl, random_tokens
from tests.support.onnx import copy_with, genai_greedy, greedy, quantized, session_of, tiny

CONTEXT = 256


@pytest.fixture(scope="session")
def int8(tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "int8"
    export(tiny(tied=False).model_copy(update={"cache": "int8"}), None, out)
    return out


def stored(folder, name):
    found = []
    copy_with(folder, folder.parent / f"copy-{name}", name, lambda values: found.append(np.array(values)))
    return found[0]


def test_the_contract_and_the_manifest_tell_of_it(int8):
    described = manifest.read(int8)
    assert described.contract.kv.dtype == "int8"
    assert {spec.dtype for spec in described.contract.inputs[2:]} == {"int8"}
    assert (described.cache_scales.tokens, "prose.txt" in described.texts) == (7 * 512, True)
    assert formats.cache_bytes(described.contract.kv) == 2 * 2 * 2 * 32 * CONTEXT
    assert admission.admit(int8) == described


def test_slots_hold_keys_and_values_in_steps_of_the_scales_and_none_is_clipped(int8):
    ids = random_tokens(CONTEXT)
    model = quantized(int8)
    with torch.no_grad():
        _, exact = eager(model.read, model.architecture, "none")(torch.tensor([ids]))
    session = ort.InferenceSession(int8 / "model.onnx")
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, CONTEXT), np.int64)}
    pasts = [one.name for one in session.get_inputs()[2:]]
    feed |= dict.fromkeys(pasts, np.zeros((1, 2, 0, 32), np.int8))
    keys, values = session.run(["present.0.key", "present.0.value"], feed)
    for codes, kind, expected in ((keys, "key", exact[0][0]), (values, "value", exact[0][1])):
        scale = stored(int8, f"model.layers.0.self_attn.{kind}_scale")[:, None]
        assert np.abs(codes.astype(int)).max() in range(64, 127)  # of any token, for tokens alone decide layer 0
        assert np.mean(np.abs(codes - np.rint(expected.numpy() / scale)) <= 1) > 0.99


def test_it_costs_little_to_the_end_of_the_context_and_damaged_scales_much(int8, untied, tmp_path):
    """Against the float cache of the same file; too small scales are those of one layer's values."""
    ids = random_tokens(CONTEXT)
    reference = eager_logits(quantized(int8), ids)[CONTEXT - 65 :]

    def damage(scale):
        scale *= 0.1

    bad = copy_with(int8, tmp_path / "bad", "model.layers.1.self_attn.value_scale", damage)
    loss = {
        folder: mean_kl(reference, forced_logits(session_of(folder), ids, CONTEXT - 64))
        for folder in (untied, int8, bad)
    }
    assert loss[int8] < loss[untied] + manifest.read(int8).plan.target.cache_limits["int8"].max_mean_kl / 10
    assert loss[bad] > 10 * loss[int8]


def test_bounds_of_keys_hold_at_every_position_and_largest_values_do_not():
    """A key whose pairs turn by half within the context meets its largest value far from calibration's end."""
    p = tiny()
    folder_model = _constant_keys(p)
    (keys, _), *_ = scales.bounds(folder_model, torch.tensor([[5] * 64]))
    with torch.no_grad():
        _, cache = eager(folder_model.read, folder_model.architecture, "none")(torch.tensor([[5] * CONTEXT]))
    everywhere = cache[0][0][0].abs().amax(1)
    near = cache[0][0][0, :, :64].abs().amax(1)
    assert (everywhere <= keys * (1 + 1e-6)).all()
    assert (everywhere > 1.25 * near).any()


def _constant_keys(p):
    from export import checkpoints
    from export.quantization import quantize
    from tests.support.onnx import CACHE

    return quantize(checkpoints.load(p.model, None), p.quant, CACHE)


@pytest.mark.parametrize("bound", [0.0, 1e-30, 1.0, 1234.5])
def test_a_scale_is_positive_covers_its_bound_with_the_margin_and_hardly_more(bound):
    (scale,) = scales.scale_of(torch.tensor([bound]))
    assert scale > 0
    assert 127 * scale >= bound * scales.MARGIN * 0.999999
    assert bound < 1 or 127 * scale <= bound * scales.MARGIN * 2 ** (1 / 8)


def test_the_last_bits_of_a_bound_change_no_scale():
    bounds = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 0.1
    changed = scales.scale_of(bounds) != scales.scale_of(bounds * (1 + 2e-7))
    assert changed.mean() < 1e-3


def test_values_that_are_no_numbers_have_no_scale(int8):
    model = quantized(int8)
    broken = dataclasses.replace(model, weights=_Broken(model.weights), store=None)
    with pytest.raises(ExportError, match="layer 0: keys or values are not finite; an int8 cache has no scale"):
        next(scales.bounds(broken, torch.tensor([[1, 2, 3]])))


class _Broken:
    def __init__(self, weights):
        self.weights, self.architecture = weights, weights.architecture

    def read(self, name):
        weight = self.weights.read(name)
        return weight * float("nan") if "v_proj" in name else weight


def test_a_graph_with_another_kind_of_scales_is_refused(int8, tmp_path):
    proto = onnx.load(int8 / "model.onnx", load_external_data=False)
    node = next(node for node in proto.graph.node if node.op_type == "GroupQueryAttention")
    next(entry for entry in node.attribute if entry.name == "k_quant_type").s = b"PER_TENSOR"
    bad = copy_with(int8, tmp_path / "bad", "cos_cache", lambda values: None)
    (bad / "model.onnx").write_bytes(proto.SerializeToString())
    reseal(bad)
    with pytest.raises(ExportError, match=r"attribute 'model.layers.0.self_attn.out.k_quant_type' is b'PER_TENSOR'"):
        admission.admit(bad)


def test_onnxruntime_genai_runs_it_with_its_unchanged_configuration(int8, untied):
    config = json.loads((int8 / "genai_config.json").read_text())
    assert config == json.loads((untied / "genai_config.json").read_text())
    prompt = random_tokens(30, vocab=250)
    assert genai_greedy(int8, prompt, 54) == greedy(session_of(int8), prompt, 24)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_onnxruntime_genai_stops_at_the_context_and_refuses_what_is_longer(int8, untied, kind):
    import onnxruntime_genai as og

    folder = {"float32": untied, "int8": int8}[kind]
    context, model = manifest.read(folder).contract.kv.context_length, og.Model(str(folder))

    def answered(length, **options):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, **options)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.full(length, 5, np.int32))
        count = 0
        while not generator.is_done():
            generator.generate_next_token()
            count += 1
        return count

    assert answered(context - 1) <= 1
    with pytest.raises(RuntimeError, match=rf"sequence length already at max_length \({context}\)"):
        answered(context)
    with pytest.raises(RuntimeError, match=rf"exceeds max length \({context}\)"):
        answered(context + 1)
    with pytest.raises(RuntimeError, match=rf"cannot be greater than model context_length \({context}\)"):
        answered(3, max_length=context + 1)
