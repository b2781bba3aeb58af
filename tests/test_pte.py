"""The ExecuTorch artifact: same integers, same numbers, accepted by the stock runner."""

import shutil

import numpy as np
import pytest
import torch

from export import backends, checkpoint, manifest, quantize
from export.backends.pte import program, readback
from export.backends.pte.model import PteLlama
from export.errors import ExportError
from export.pipeline import export
from export.plan import Plan, load_plan
from runtime_tests.session import open_session


def plan(quant: str = "int4-g32") -> Plan:
    return load_plan("tiny", quant, "executorch-xnnpack")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pte") / "tiny"
    export(plan(), None, out)
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    weights = checkpoint.load(plan().model, None)
    return quantize.quantize(weights, plan().quant, tmp_path_factory.mktemp("cache"))


def tokens(count: int, seed: int = 7) -> list[int]:
    return torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def weights_differ(artifact, model) -> list[str]:
    stored = backends.load("pte").read_weights(artifact, model.architecture)
    return [
        weight.name
        for weight in stored
        for expected in [model.read(weight.name)]
        if not np.array_equal(weight.qdata, expected.qdata) or not np.array_equal(weight.scale, expected.scale)
    ]


def test_integers_and_scales_in_the_file_are_the_quantizers(folder, model):
    names = [w.name for w in backends.load("pte").read_weights(folder / "model.pte", model.architecture)]
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


def decoded(form: PteLlama, ids: list[int], prefill: int) -> torch.Tensor:
    """Logits after the prefill and after each further token."""
    with torch.no_grad():
        parts = [form(torch.tensor([ids[:prefill]]), torch.tensor([0]))]
        parts += [form(torch.tensor([[t]]), torch.tensor([i])) for i, t in enumerate(ids) if i >= prefill]
    return torch.cat(parts, dim=1)[0]


def test_model_form_computes_what_the_model_computes():
    """The XNNPACK form and export.model, both in PyTorch and float32, on a filled cache."""
    weights = checkpoint.load(plan().model, None)
    ids = tokens(100)
    with torch.no_grad():
        expected, _ = quantize.eager(weights.read, weights.architecture, "none")(torch.tensor([ids]))
    got = decoded(PteLlama(eager_reader(weights), weights.architecture, 256).eval(), ids, 60)
    assert (got - expected[0, 59:]).abs().max() < 1e-4


def eager_reader(weights):
    return lambda name: weights.read("model.embed_tokens.weight" if name == "lm_head.weight" else name)


def test_quantized_model_form_rounds_as_torchao_does(model):
    """int8 rounding turns float noise into steps, so equality shows where no value stood on an edge: most tokens."""
    form = PteLlama(model.read, model.architecture, 256).eval()
    reference = quantize.eager(model.read, model.architecture, "int8-per-token")
    with torch.no_grad():
        pairs = [(decoded(form, [t], 1)[0], reference(torch.tensor([[t]]))[0][0, 0]) for t in range(64)]
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
    assert errors.median() < 1e-4


def test_fp32_artifact_equals_fp32_model(tmp_path):
    built = export(plan("fp32"), None, tmp_path / "fp32")
    weights = checkpoint.load(plan().model, None)
    ids = tokens(100)
    with torch.no_grad():
        expected = quantize.eager(weights.read, weights.architecture, "none")(torch.tensor([ids]))[0][0, 31:]
    session = open_session(tmp_path / "fp32", built, threads=2)
    got = [session.feed(ids[:32]), *(session.feed([t]) for t in ids[32:])]
    session.close()
    assert (torch.tensor(np.stack(got)) - expected).abs().max() < 1e-3


def test_feeding_in_pieces_continues_the_cache(folder):
    session = open_session(folder, manifest.read(folder), threads=2)
    ids = tokens(90)
    at_once = session.feed(ids)
    session.reset()
    session.feed(ids[:50])
    for t in ids[50:-1]:
        session.feed([t])
    in_pieces = session.feed(ids[-1:])
    assert np.argmax(at_once) == np.argmax(in_pieces)
    assert np.abs(at_once - in_pieces).max() < 0.3 * at_once.std()
    session.reset()
    session.feed(tokens(89, seed=8))
    assert np.abs(session.feed(ids[-1:]) - at_once).max() > at_once.std()  # another past is another answer


def test_context_ends_where_the_contract_says(folder):
    session = open_session(folder, manifest.read(folder), threads=2)
    session.feed(tokens(256))
    with pytest.raises(ValueError, match="context holds 256"):
        session.feed([1])


def test_same_inputs_give_the_same_bytes(folder, tmp_path):
    again = export(plan(), None, tmp_path / "again")
    assert again.files == manifest.read(folder).files


def contents(artifact) -> tuple[list[str], list[int], set[bytes]]:
    """Instructions, XNNPACK nodes per delegate (in any order) and constants of a file."""
    file = readback.open_pte(artifact)
    plan = file.program.execution_plan[0]
    blobs = [delegate.processed.index for delegate in plan.delegates]
    graphs = [readback.xnnpack_graph(file.segments[index]) for index in blobs]
    nodes = [sorted(node["xnode_union_type"] for node in graph["xnodes"]) for graph in graphs]
    constants = {bytes(segment) for i, segment in enumerate(file.segments) if i not in blobs}
    return [str(instruction) for instruction in plan.chains[0].instructions], nodes, constants


def test_fast_lowering_changes_nothing_that_runs(folder, tmp_path, monkeypatch):
    """Every shortcut off: torch's decompositions and executorch's slow passes give the same program and numbers."""
    from contextlib import nullcontext

    monkeypatch.setattr(program, "fast_lowering", nullcontext)
    monkeypatch.setattr(program, "no_decompositions", nullcontext)
    monkeypatch.setattr(program, "functionalize", lambda exported: exported)
    export(plan(), None, tmp_path / "slow")
    assert contents(tmp_path / "slow" / "model.pte") == contents(folder / "model.pte")
    ids = tokens(80)
    for fast, slow in zip(answers(folder, ids), answers(tmp_path / "slow", ids), strict=True):
        np.testing.assert_array_equal(fast, slow)


def answers(folder, ids) -> list[np.ndarray]:
    """Logits of a prefill and of each decode step after it."""
    session = open_session(folder, manifest.read(folder), threads=2)
    return [session.feed(ids[:16]), *(session.feed([t]) for t in ids[16:])]


def test_lowering_is_refused_on_other_library_versions(tmp_path, monkeypatch):
    from export.backends.pte import fast

    monkeypatch.setitem(fast.WRITTEN_FOR, "executorch", "9.9.9")
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
        manifest.verify_files(tmp_path / "cut", manifest.read(tmp_path / "cut"))


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
def test_what_xnnpack_gets_silently_wrong_is_refused(quant, target, message):
    good = plan()
    recipe = type(good.quant).model_validate({**good.quant.model_dump(), **quant})
    goal = type(good.target).model_validate({**good.target.model_dump(), **target})
    bad = good.model_copy(update={"quant": recipe, "target": goal})
    with pytest.raises(ExportError, match=message):
        backends.load("pte").check(bad, good.model.architecture)


def test_a_flipped_bit_in_the_kept_quantization_is_refused(tmp_path):
    """Otherwise artifact and store would agree on wrong integers."""
    weights = checkpoint.load(plan().model, None)
    store = quantize.quantize(weights, plan().quant, tmp_path).store
    data = bytearray(store.read_bytes())
    data[-1000] ^= 4
    store.write_bytes(data)
    with pytest.raises(ExportError, match="changed since they were written"):
        quantize.quantize(weights, plan().quant, tmp_path)
