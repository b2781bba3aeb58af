"""The ExecuTorch artifact: same integers, same numbers, accepted by the stock runner."""

import shutil

import numpy as np
import pytest
import torch

from export import backends, checkpoint, manifest, quantize
from export.backends.pte import program
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
    assert sorted(names) == sorted(quantize.quantized_names(model.architecture, model.recipe))
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


def test_model_form_computes_what_the_model_computes(model):
    """The XNNPACK form and export.model, both in PyTorch, on a filled cache."""
    form = PteLlama(model.read, model.architecture, 256).eval()
    reference = quantize.eager(model.read, model.architecture, "int8-per-token")
    ids = tokens(100)
    with torch.no_grad():
        expected, _ = reference(torch.tensor([ids]))
        form(torch.tensor([ids[:60]]), torch.tensor([0]))
        got = [form(torch.tensor([[t]]), torch.tensor([60 + i]))[0, 0] for i, t in enumerate(ids[60:])]
    # int8 rounding turns float noise into steps, so equality holds for most positions, not for all
    errors = (torch.stack(got) - expected[0, 60:]).abs().amax(-1) / expected.std()
    assert errors.median() < 1e-3
    assert errors.max() < 0.3


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


def test_stock_runner_generates_our_text(folder):
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    built = manifest.read(folder)
    prompt = "Once upon a time there was a small model that"
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    text: list[str] = []
    runner.generate(prompt, GenerationConfig(max_new_tokens=24, temperature=0.0, echo=False), text.append)
    from export.tokenizer import load

    tokenizer = load(folder)
    session = open_session(folder, built, threads=2)
    logits, ours = session.feed(tokenizer(prompt, add_special_tokens=False).input_ids), []
    for _ in range(24):
        ours.append(int(np.argmax(logits)))
        if ours[-1] in built.tokenizer.eos_ids:
            break
        logits = session.feed([ours[-1]])
    assert "".join(text).strip("\ufffd") == tokenizer.decode(ours, skip_special_tokens=True).strip("\ufffd")


def test_same_inputs_give_the_same_bytes(folder, tmp_path):
    again = export(plan(), None, tmp_path / "again")
    assert again.files == manifest.read(folder).files


def test_fast_lowering_changes_no_byte(folder, model, tmp_path, monkeypatch):
    """Everything in fast.py off: the library's own, slow way gives the same file."""
    from contextlib import nullcontext

    monkeypatch.setattr(program, "fast_lowering", nullcontext)
    export(plan(), None, tmp_path / "slow")
    assert (tmp_path / "slow" / "model.pte").read_bytes() == (folder / "model.pte").read_bytes()


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
