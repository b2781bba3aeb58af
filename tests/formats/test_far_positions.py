"""The whole 131,072 positions of Llama 3.2 in every format: rotary tables, masks, and integers past 16 bits."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from export import checkpoints
from export.architecture import RopeScaling
from export.checkpoints.folder import config_json
from export.formats import mlpackage
from export.formats.onnx_kv.weights import StoredTensors
from export.formats.pte.cache import quantize
from export.formats.pte.graph import Constants, PteLlama
from export.model import rope_tables
from export.pipeline import export
from export.plan import load_plan
from export.quantization.eager import eager
from runtime_tests.coreml.package import load as load_package
from runtime_tests.sessions.mlpackage import Evaluated, causal_mask

LONGEST = 131_072
PLACES = (0, 8_000, 32_767, 32_768, 65_503, 65_504, 65_505, 100_000, LONGEST - 1)
STARTS = (32_764, 65_500, LONGEST - 8)
TOKENS = [3, 141, 59, 26, 53, 58, 97, 93]
SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def plan(target="onnx-cpu", cache=None):
    """The tiny model with the positions of Llama 3.2, in float."""
    p = load_plan("tiny", "fp32", target, cache=cache)
    shapes = {"max_position_embeddings": LONGEST, "rope_theta": 500000.0, "rope_scaling": SCALING}
    architecture = p.model.architecture.model_copy(update=shapes)
    model = p.model.model_copy(update={"architecture": architecture, "context_length": LONGEST})
    return p.model_copy(update={"model": model})


@pytest.fixture(scope="module")
def weights():
    return checkpoints.load(plan().model, None)


@pytest.fixture(scope="module")
def onnx_folders(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp("far") / kind for kind in ("float32", "int8")}
    for kind, folder in folders.items():
        export(plan(cache=kind), None, folder)
    return folders


@pytest.fixture(scope="module")
def package(tmp_path_factory, weights):
    from export.quantization import quantize

    model = quantize(weights, plan().quant, tmp_path_factory.mktemp("store"))
    path = tmp_path_factory.mktemp("far") / "model.mlpackage"
    mlpackage.convert(model, mlpackage.io_contract(model.architecture, plan(target="coreml")), path, "fused")
    return path


def of_transformers(a, size=None):
    """cos and sin at PLACES, float32 [places, D/2]."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    a = a.model_copy(update={"head_dim": size or a.head_dim})
    rope = LlamaRotaryEmbedding(LlamaConfig.from_dict(config_json(a, torch.float32)))
    tables = rope(torch.zeros(1), torch.tensor([PLACES]))
    return [table[0, :, : a.head_dim // 2].numpy() for table in tables]


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_rotary_tables_are_those_of_transformers_to_the_last_position(weights, size, factor):
    scaling = SCALING.model_copy(update={"factor": factor})
    a = weights.architecture.model_copy(update={"head_dim": size, "rope_scaling": scaling})
    for ours, theirs in zip(rope_tables(a, LONGEST), of_transformers(a), strict=True):
        np.testing.assert_allclose(ours.numpy()[list(PLACES)], theirs, atol=1e-6)


def test_every_format_stores_them(weights, onnx_folders, package):
    expected, places = of_transformers(weights.architecture), list(PLACES)
    import onnx

    proto = onnx.load(onnx_folders["float32"] / "model.onnx", load_external_data=False)
    stored = StoredTensors(proto.graph.initializer, onnx_folders["float32"])
    constants, operations = Constants(weights.architecture, LONGEST), load_package(package).operations
    in_package = {name: op.inputs["val"][0].value for op in operations if op.kind == "const" for name, _ in op.outputs}
    for name, table in zip(("cos", "sin"), expected, strict=True):
        np.testing.assert_allclose(stored.read(f"{name}_cache")[places], table, atol=1e-6)
        np.testing.assert_allclose(getattr(constants, name)[places, :16], table, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(in_package[f"{name}_table"])[places, 16:], table.astype(np.float16))


def filled(a, start):
    """A cache of `start` tokens, as none was ever fed: [1, G, T, D] for each layer's keys and values."""
    generator = torch.Generator().manual_seed(start)
    shape = (1, a.num_key_value_heads, start, a.head_dim)
    return [tuple(torch.randn(shape, generator=generator) for _ in "kv") for _ in range(a.num_hidden_layers)]


def logits_after(weights, cache):
    with torch.no_grad():
        return eager(weights.read, weights.architecture, "none")(torch.tensor([TOKENS]), tuple(cache))[0][0, -1].numpy()


def differ(logits, expected):
    return np.linalg.norm(logits.astype(np.float32) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_onnx_attends_to_all_that_came_before(weights, onnx_folders, kind, start):
    cache = filled(weights.architecture, start)
    session = ort.InferenceSession(onnx_folders[kind] / "model.onnx")
    feed = {"input_ids": np.array([TOKENS]), "attention_mask": np.ones((1, start + len(TOKENS)), np.int64)}
    names = [one.name for one in session.get_inputs()[2:]]
    if kind == "int8":
        import onnx

        proto = onnx.load(onnx_folders[kind] / "model.onnx", load_external_data=False)
        stored = StoredTensors(proto.graph.initializer, onnx_folders[kind])
        scales = [
            tuple(
                torch.tensor(stored.read(f"model.layers.{i}.self_attn.{one}_scale"))[None, :, None] for one in names_of
            )
            for i, names_of in enumerate([("key", "value")] * len(cache))
        ]
        codes = [
            tuple((x / s).round().clamp(-128, 127) for x, s in zip(*pair, strict=True))
            for pair in zip(cache, scales, strict=True)
        ]
        cache = [tuple(c * s for c, s in zip(*pair, strict=True)) for pair in zip(codes, scales, strict=True)]
        fed = [c.to(torch.int8).numpy() for layer in codes for c in layer]
    else:
        fed = [x.numpy() for layer in cache for x in layer]
    (logits,) = session.run(["logits"], feed | dict(zip(names, fed, strict=True)))
    assert differ(logits[0, -1], logits_after(weights, cache)) < {"float32": 1e-4, "int8": 1e-2}[kind]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_executorchs_operators_attend_to_all_that_came_before(weights, kind, start):
    import export.formats.pte.program  # noqa: F401 – loads the operators
    from export.formats import kv_layout

    p, cache = plan("executorch-xnnpack", kind), filled(weights.architecture, start)
    form = PteLlama(_untied(weights), weights.architecture, kv_layout(p, weights.architecture, "state")).eval()
    for layer, (keys, values) in zip(form.layers, cache, strict=True):
        for name, x in (("key", keys.transpose(1, 2)), ("value", values.transpose(1, 2))):
            parts = zip(("cache", "zeros", "scales"), quantize(x) if kind == "int8" else [x], strict=False)
            for part, stored in parts:
                getattr(layer, f"{name}_{part}")[:, :start] = stored
    with torch.no_grad():
        logits = form(torch.tensor([TOKENS]), torch.tensor([start]))[0, -1].numpy()
    assert differ(logits, logits_after(weights, cache)) < {"float32": 1e-4, "bfloat16": 2e-2, "int8": 2e-2}[kind]


def _untied(weights):
    return lambda name: weights.read("model.embed_tokens.weight" if name == "lm_head.weight" else name)


@pytest.mark.parametrize("start", STARTS)
def test_core_ml_attends_to_all_that_came_before(weights, package, start):
    cache, model = filled(weights.architecture, start), Evaluated(package, 1)
    state = model.make_state()
    for i, pair in enumerate(cache):
        for name, x in zip(("keyCache", "valueCache"), pair, strict=True):
            state.tensors[name][i, :, :, :start] = x.half()
    inputs = {"inputIds": np.array([TOKENS], np.int32), "causalMask": causal_mask(start, len(TOKENS))}
    logits = model.predict(inputs, state)["logits"][0, -1]
    assert differ(logits, logits_after(weights, cache)) < 2e-2
