"""The ExecuTorch artifact: same integers, same numbers, accepted by the stock runner."""

import shutil

import numpy as np
import pytest
import torch

from export import checkpoints, formats, manifest, quantization
from export.errors import ExportError
from export.formats import admission
from export.formats.pte import program
from export.formats.pte.file import open_pte, xnnpack_graph
from export.formats.pte.graph import PteLlama
from export.pipeline import export
from export.plan import Plan, load_plan
from export.quantization.eager import eager
from export.toolbox import model_checks
from runtime_tests.sessions import open_session
from tests.support.metrics import eager_logits, forced_logits, random_tokens


def plan(quant: str = "int4-g32") -> Plan:
    return load_plan("tiny", quant, "executorch-xnnpack")


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("executorch-xnnpack")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    weights = checkpoints.load(plan().model, None)
    return quantization.quantize(weights, plan().quant, tmp_path_factory.mktemp("cache"))


def weights_differ(artifact, model) -> list[str]:
    stored = formats.reader("pte").read_weights(artifact, model.architecture)
    return [
        weight.name
        for weight in stored
        for expected in [model.read(weight.name)]
        if not np.array_equal(weight.qdata, expected.qdata) or not np.array_equal(weight.scale, expected.scale)
    ]


def test_integers_and_scales_in_the_file_are_the_quantizers(folder, model):
    names = [w.name for w in formats.reader("pte").read_weights(folder / "model.pte", model.architecture)]
    assert sorted(names) == sorted(model.schemes.names)
    assert weights_differ(folder / "model.pte", model) == []


def test_a_flipped_scale_is_seen(folder, model, tmp_path):
    scale = model.read("model.layers.1.mlp.up_proj.weight").scale.to(torch.bfloat16)
    stored = scale.view(torch.int16).numpy().tobytes()
    data = bytearray((folder / "model.pte").read_bytes())
    at = data.find(stored)
    assert at > 0
    data[at] ^= 1
    (tmp_path / "model.pte").write_bytes(data)
    assert weights_differ(tmp_path / "model.pte", model) == ["model.layers.1.mlp.up_proj.weight"]


def slots(a, dtype="float32"):
    """The cache's part of a contract."""
    wanted = load_plan("tiny", "int4-g32", "executorch-xnnpack", cache=dtype)
    return formats.kv_layout(wanted, a, "state")


def decoded(form: PteLlama, ids: list[int], prefill: int) -> torch.Tensor:
    """Logits after the prefill and after each further token."""
    with torch.no_grad():
        parts = [form(torch.tensor([ids[:prefill]]), torch.tensor([0]))]
        parts += [form(torch.tensor([[t]]), torch.tensor([i])) for i, t in enumerate(ids) if i >= prefill]
    return torch.cat(parts, dim=1)[0]


def test_model_form_has_the_logits_of_the_model():
    """The XNNPACK form and export.model, both in PyTorch and float32, on a filled cache."""
    weights = checkpoints.load(plan().model, None)
    ids = random_tokens(100)
    expected = eager_logits(weights, ids)
    logits = decoded(PteLlama(eager_reader(weights), weights.architecture, slots(weights.architecture)).eval(), ids, 60)
    assert (logits - expected[59:]).abs().max() < 1e-4


def to_int8(x):
    """To 256 steps from the smallest to the largest of a head, and 0 is one of them."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0).double(), x.amax(-1, keepdim=True).clamp(min=0).double()
    scale = (high - low) / 255
    zero = torch.round(-128 - low / scale)
    return (((x / scale).round() + zero).clamp(-128, 127) - zero).mul(scale).float()


@pytest.mark.parametrize(
    ("kind", "rounding"), [("bfloat16", lambda x: x.bfloat16().float()), ("int8", to_int8)], ids=["bfloat16", "int8"]
)
def test_a_smaller_cache_rounds_queries_keys_and_values_and_nothing_else(monkeypatch, kind, rounding):
    """Against the reference model, whose attention is made to read the same rounded numbers."""
    weights, ids = checkpoints.load(plan().model, None), random_tokens(100)
    exact = eager_logits(weights, ids)[59:]
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda q, k, v, **options: attend(*map(rounding, (q, k, v)), **options),
    )
    rounded = eager_logits(weights, ids)[59:]
    monkeypatch.undo()
    form = PteLlama(eager_reader(weights), weights.architecture, slots(weights.architecture, kind)).eval()
    logits = decoded(form, ids, 60)
    assert {layer.key_cache.dtype for layer in form.layers} == {getattr(torch, kind)}
    error = (logits - exact).norm()
    assert error < 2e-2 * exact.norm()
    assert (logits - rounded).norm() < (
        0.05 if kind == "int8" else 1
    ) * error  # attention in bfloat16 rounds its sums too


def test_an_int8_cache_and_its_scales_are_what_the_contract_says(tiny, tmp_path):
    folder = tiny("executorch-xnnpack", "fp32", "int8")
    described = manifest.read(folder)
    kv = described.contract.kv
    numbers = 2 * kv.layers * kv.kv_heads * kv.context_length
    assert formats.cache_bytes(kv) == numbers * (kv.head_dim + 5)
    cache = formats.reader("pte").contents(folder / "model.pte", described.architecture).cache
    assert sum(formats.size(spec.dtype, spec.shape) for spec in cache) == formats.cache_bytes(kv)
    assert model_checks.check(folder) == []
    wrong = shutil.copytree(folder, tmp_path / "wrong") / manifest.FILE
    wrong.write_text(wrong.read_text().replace('"scale_bytes": 5', '"scale_bytes": 4'))
    assert model_checks.check(wrong.parent) == [
        f"cache: {numbers * 5} bytes of scales in the file, the contract has {numbers * 4}"
    ]


def eager_reader(weights):
    return lambda name: weights.read("model.embed_tokens.weight" if name == "lm_head.weight" else name)


def test_quantized_model_form_rounds_as_torchao_does(model):
    """int8 rounding turns float noise into steps, so only tokens without a value near an edge, most, are equal."""
    form = PteLlama(model.read, model.architecture, slots(model.architecture)).eval()
    reference = eager(model.read, model.architecture, "int8-per-token")
    with torch.no_grad():
        pairs = [(decoded(form, [t], 1)[0], reference(torch.tensor([[t]]))[0][0, 0]) for t in range(64)]
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
    assert errors.median() < 1e-4


def test_fp32_artifact_equals_fp32_model(tmp_path):
    built = export(plan("fp32"), None, tmp_path / "fp32")
    weights = checkpoints.load(plan().model, None)
    ids = random_tokens(100)
    session = open_session(tmp_path / "fp32", built, threads=2)
    logits = forced_logits(session, ids, 32)
    session.close()
    assert (logits - eager_logits(weights, ids)[31:]).abs().max() < 1e-3


def test_feeding_in_pieces_continues_the_cache(folder):
    session = open_session(folder, manifest.read(folder), threads=2)
    ids = random_tokens(90)
    at_once = session.feed(ids)
    session.reset()
    session.feed(ids[:50])
    for t in ids[50:-1]:
        session.feed([t])
    in_pieces = session.feed(ids[-1:])
    assert np.argmax(at_once) == np.argmax(in_pieces)
    assert np.abs(at_once - in_pieces).max() < 0.3 * at_once.std()
    session.reset()
    session.feed(random_tokens(89, seed=8))
    assert np.abs(session.feed(ids[-1:]) - at_once).max() > at_once.std()  # a different past gives different logits


def test_context_ends_where_the_contract_says(folder):
    session = open_session(folder, manifest.read(folder), threads=2)
    session.feed(random_tokens(256))
    with pytest.raises(ValueError, match="context holds 256"):
        session.feed([1])


def test_same_inputs_give_the_same_bytes(folder, tmp_path):
    again = export(plan(), None, tmp_path / "again")
    assert again.files == manifest.read(folder).files


def contents(artifact) -> tuple[list[str], list[int], set[bytes]]:
    """Instructions, XNNPACK nodes per delegate (in any order) and constants of a file."""
    file = open_pte(artifact)
    plan = file.program.execution_plan[0]
    blobs = [delegate.processed.index for delegate in plan.delegates]
    graphs = [xnnpack_graph(file.segments[index]) for index in blobs]
    nodes = [sorted(node["xnode_union_type"] for node in graph["xnodes"]) for graph in graphs]
    constants = {bytes(segment) for i, segment in enumerate(file.segments) if i not in blobs}
    return [str(instruction) for instruction in plan.chains[0].instructions], nodes, constants


def test_fast_lowering_changes_nothing_that_runs(folder, tmp_path, monkeypatch):
    """With all shortcuts off, torch's decompositions and executorch's slow passes give the same program and logits."""
    from contextlib import nullcontext

    monkeypatch.setattr(program, "fast_lowering", nullcontext)
    monkeypatch.setattr(program, "no_decompositions", nullcontext)
    monkeypatch.setattr(program, "functionalize", lambda exported: exported)
    export(plan(), None, tmp_path / "slow")
    assert contents(tmp_path / "slow" / "model.pte") == contents(folder / "model.pte")
    ids = random_tokens(80)
    for fast, slow in zip(stepwise_logits(folder, ids), stepwise_logits(tmp_path / "slow", ids), strict=True):
        np.testing.assert_array_equal(fast, slow)


def stepwise_logits(folder, ids) -> list[np.ndarray]:
    """Logits of a prefill and of each decode step after it."""
    session = open_session(folder, manifest.read(folder), threads=2)
    return [session.feed(ids[:16]), *(session.feed([t]) for t in ids[16:])]


def test_lowering_is_refused_on_other_library_versions(tmp_path, monkeypatch):
    from export.formats.pte import lowering

    monkeypatch.setitem(lowering.WRITTEN_FOR, "executorch", "9.9.9")
    with pytest.raises(ExportError, match=r"lowering needs 9\.9\.9"):
        export(plan(), None, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_truncated_file_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    path = tmp_path / "cut" / "model.pte"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(Exception, match=r".+"):
        open_session(tmp_path / "cut", manifest.read(tmp_path / "cut"), threads=1)
    with pytest.raises(ExportError, match=r"model\.pte"):
        admission.require(tmp_path / "cut", manifest.read(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("quant", "target", "message"),
    [
        ({}, {"activations": "none"}, "weight-only linears wrongly"),
        ({}, {"logits": "all"}, "set `logits: last`"),
        ({"linear": {"bits": 4, "group_size": 16}}, {}, r"layers\.0\.self_attn\.q_proj.*multiple of 32"),
        ({"linear": {"bits": 8, "group_size": 32}}, {}, "no int8 groups"),
        ({"embedding": {"bits": 4, "group_size": 32}}, {}, "embedding must be int8 per channel"),
    ],
)
def test_plans_that_xnnpack_silently_miscomputes_are_refused(quant, target, message):
    good = plan()
    recipe = type(good.quant).model_validate({**good.quant.model_dump(), **quant})
    goal = type(good.target).model_validate({**good.target.model_dump(), **target})
    bad = good.model_copy(update={"quant": recipe, "target": goal})
    with pytest.raises(ExportError, match=message):
        formats.load("pte").check(bad, good.model.architecture)


def test_a_flipped_bit_in_the_quantized_store_is_refused(tmp_path):
    """Otherwise artifact and store would agree on wrong integers."""
    weights = checkpoints.load(plan().model, None)
    store = quantization.quantize(weights, plan().quant, tmp_path).store
    data = bytearray(store.read_bytes())
    data[-1000] ^= 4
    store.write_bytes(data)
    with pytest.raises(ExportError, match="changed since they were written"):
        quantization.quantize(weights, plan().quant, tmp_path)
