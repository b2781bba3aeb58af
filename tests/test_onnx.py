"""What an ONNX artifact promises: our integers, our logits with a filled cache, stock clients, the same bytes again."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import checkpoint, manifest, plan
from export.backends import onnx_kv
from export.backends._onnx_activations import sensitive
from export.backends._onnx_weights import block_size, shortest
from export.errors import ExportError
from export.pipeline import CACHE, export
from export.quantize import QuantizedModel, eager, quantize
from export.schemes import EMBEDDING
from export.tokenizer import load as load_tokenizer
from runtime_tests.session import open_session

PREFILL, DECODE = 40, 80
PER_CHANNEL_8 = plan.WeightScheme(bits=8, group_size=None)
GROUPS_4 = plan.WeightScheme(bits=4, group_size=32)


def tiny(quant="int4-g32", linear=None, table=None, tied=True, logits="last") -> plan.Plan:
    """The tiny plan with another recipe, linear scheme, embedding/head scheme, an untied head, or all logits."""
    p = plan.load_plan("tiny", quant, "onnx-cpu")
    recipe = p.quant.model_copy(
        update={
            "linear": linear or p.quant.linear,
            "embedding": table or p.quant.embedding,
            "head": table or p.quant.head,
        }
    )
    model = p.model.model_copy(
        update={"architecture": p.model.architecture.model_copy(update={"tie_word_embeddings": tied})}
    )
    target = p.target.model_copy(update={"logits": logits})
    return p.model_copy(update={"quant": recipe, "model": model, "target": target})


def quantized(folder: Path) -> QuantizedModel:
    p = manifest.read(folder).plan
    return quantize(checkpoint.load(p.model, None), p.quant, CACHE)


def session_of(folder: Path):
    return open_session(folder, manifest.read(folder), threads=1)


def readback(folder: Path):
    return {w.name: w for w in onnx_kv.read_weights(folder / "model.onnx", manifest.read(folder).architecture)}


def assert_same_integers(folder: Path) -> None:
    model, found = quantized(folder), readback(folder)
    assert list(found) == model.schemes.names
    for name, weight in found.items():
        want = model.read(name)
        np.testing.assert_array_equal(weight.qdata, want.qdata.numpy(), err_msg=name)
        np.testing.assert_array_equal(weight.scale, want.scale.numpy(), err_msg=name)


def tokens(count: int, vocab: int = 512) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def compare(folder: Path, ids: list[int]) -> tuple[float, float, float]:
    """Mean KL(eager ‖ artifact), top-1 agreement and SQNR in dB over prefill, then one token at a time."""
    session, model = session_of(folder), quantized(folder)
    got = [session.feed(ids[:PREFILL])] + [session.feed([token]) for token in ids[PREFILL:]]
    with torch.no_grad():
        logits, _ = eager(model.read, model.architecture, "none")(torch.tensor([ids]))
    want, artifact = logits[0, PREFILL - 1 :].double(), torch.tensor(np.array(got)).double()
    p, q = want.log_softmax(-1), artifact.log_softmax(-1)
    sqnr = 10 * torch.log10(want.square().sum() / (want - artifact).square().sum())
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(kl), float((p.argmax(-1) == q.argmax(-1)).double().mean()), float(sqnr)


def copy_with(folder: Path, to: Path, tensor: str, change) -> Path:
    """A copy of an artifact with one stored tensor changed in model.onnx.data."""
    shutil.copytree(folder, to)
    initializers = onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    found = next(t for t in initializers if t.name == tensor)
    where = onnx.external_data_helper.ExternalDataInfo(found)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(found.data_type)
    stored = np.memmap(to / where.location, dtype, "r+", where.offset, tuple(found.dims))
    change(stored)
    stored.flush()
    return to


@pytest.fixture(scope="session")
def artifact(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "tiny"
    export(tiny(), None, out)
    return out


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    """Random weights with a tied head repeat their last token with certainty; an untied head spreads its bets."""
    out = tmp_path_factory.mktemp("onnx") / "untied"
    export(tiny(tied=False), None, out)
    return out


@pytest.fixture(scope="session")
def all_logits(tmp_path_factory) -> Path:
    """For clients that score prompts: the same untied model with the logits of every position."""
    out = tmp_path_factory.mktemp("onnx") / "all"
    export(tiny(tied=False, logits="all"), None, out)
    return out


@pytest.fixture(scope="session")
def lm_eval_model(all_logits):
    from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM

    return ONNXRuntimeGenAILM(str(all_logits), max_gen_toks=12)


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
    """Two bytes each, one per group or row; onnxruntime gets float32 when it loads the file."""
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


@pytest.mark.parametrize("fixture", ["artifact", "untied"])
def test_logits_with_a_filled_cache_are_those_of_the_quantized_model(request, fixture):
    folder = request.getfixturevalue(fixture)
    kl, top1, sqnr = compare(folder, tokens(PREFILL + DECODE))
    limits = manifest.read(folder).plan.target.limits
    assert kl <= limits.max_mean_kl / 4  # two layers only
    assert top1 >= limits.min_top1
    assert sqnr >= 30


def test_one_damaged_scale_row_shows_in_the_logits(untied, tmp_path):
    def damage(scales):
        scales[:8] *= 2

    bad = copy_with(untied, tmp_path / "bad", "model.layers.0.self_attn.o_proj.weight.scale", damage)
    kl, _, sqnr = compare(bad, tokens(PREFILL + DECODE))
    assert kl > manifest.read(bad).plan.target.limits.max_mean_kl / 10
    assert sqnr < 30


def with_level(folder: Path, to: Path, level: int) -> Path:
    """A copy of an artifact whose every MatMulNBits has one accuracy_level."""
    shutil.copytree(folder, to)
    proto = onnx.load(to / "model.onnx", load_external_data=False)
    for entry in (entry for node in proto.graph.node for entry in node.attribute):
        if entry.name == "accuracy_level":
            entry.i = level
    (to / "model.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    return to


def test_linears_that_rounded_activations_hurt_most_are_computed_in_float(artifact):
    levels = {
        node.input[1].removesuffix(".weight.q"): next(a.i for a in node.attribute if a.name == "accuracy_level")
        for node in onnx.load(artifact / "model.onnx", load_external_data=False).graph.node
        if node.op_type == "MatMulNBits"
    }
    in_float = [name.removeprefix("model.layers.") for name, level in levels.items() if level == 1]
    assert in_float == ["0.self_attn.qkv_proj", "0.mlp.down_proj", "1.mlp.down_proj"]
    assert set(levels.values()) == {1, 4}
    assert manifest.read(artifact).lowering["float_activation_nodes"] == len(in_float)


def test_float_activations_are_where_the_error_is_not(untied, tmp_path):
    """Negative twin: int8 everywhere is worse than what ships, float everywhere is exact."""
    ids = tokens(PREFILL + DECODE)
    shipped, all_int8, all_float = (
        compare(folder, ids)[0]
        for folder in (untied, with_level(untied, tmp_path / "int8", 4), with_level(untied, tmp_path / "float", 1))
    )
    assert all_float < shipped / 100
    assert all_int8 > 1.5 * shipped


def test_eight_bit_weights_stay_out_of_the_slow_float_kernel(tmp_path):
    export(tiny(linear=PER_CHANNEL_8), None, tmp_path / "int8")
    assert manifest.read(tmp_path / "int8").lowering["float_activation_nodes"] == 0


def test_a_quarter_of_the_layers_counts_as_early():
    qkv = {f"model.layers.{i}.self_attn.qkv_proj.weight" for i in range(4)}
    stacked = {name for name in sensitive(16) if "qkv" in name}
    assert stacked == qkv
    assert {name for name in sensitive(16) if "mlp" in name} == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.15.mlp.down_proj.weight",
    }


@pytest.mark.parametrize(
    ("columns", "block"), [(8192, 256), (2048, 128), (3072, 128), (576, 32), (1184, 32), (272, 16), (48, 16), (264, 0)]
)
def test_a_channel_is_cut_into_small_blocks_because_activations_are_rounded_per_block(columns, block):
    assert block_size(PER_CHANNEL_8, columns) == block


@pytest.mark.parametrize("tied", [True, False])
def test_the_float_recipe_is_the_float_model(tmp_path, tied):
    export(tiny("fp32", tied=tied), None, tmp_path / "fp32")
    kl, top1, sqnr = compare(tmp_path / "fp32", tokens(PREFILL + DECODE))
    assert abs(kl) < 1e-6
    assert top1 == 1
    assert sqnr > 90
    assert list(readback(tmp_path / "fp32")) == []


@pytest.mark.parametrize(
    ("linear", "table", "tied"),
    [(PER_CHANNEL_8, None, False), (None, GROUPS_4, True), (GROUPS_4, GROUPS_4, False)],
    ids=["int8-linears", "int4-tied-table", "int4-untied-table"],
)
def test_every_scheme_keeps_integers_and_logits(tmp_path, linear, table, tied):
    folder = tmp_path / "variant"
    export(tiny(linear=linear, table=table, tied=tied), None, folder)
    assert_same_integers(folder)
    assert compare(folder, tokens(PREFILL + DECODE))[2] >= 25


def test_a_tied_embedding_is_stored_once(artifact):
    a = manifest.read(artifact).architecture
    tables = [
        tensor.name
        for tensor in onnx.load(artifact / "model.onnx", load_external_data=False).graph.initializer
        if tensor.dims[0] == a.vocab_size and np.prod(tensor.dims) == a.vocab_size * a.hidden_size
    ]
    assert tables == [f"{EMBEDDING}.q"]
    assert manifest.read(artifact).lowering["shared_embedding_bytes"] >= a.vocab_size * a.hidden_size


def test_the_cache_continues_whatever_the_pieces(untied):
    ids, session = tokens(96), session_of(untied)
    at_once = session.feed(ids)
    session.reset()
    for start, end in ((0, 1), (1, 30), (30, 31), (31, 90), (90, 96)):
        in_pieces = session.feed(ids[start:end])
    np.testing.assert_allclose(in_pieces, at_once, rtol=0, atol=0.02 * np.abs(at_once).max())
    session.reset()
    assert not np.allclose(session.feed(ids[-1:]), at_once, atol=0.02 * np.abs(at_once).max())


def test_the_last_slot_can_be_fed_and_the_next_is_refused(artifact):
    session, length = session_of(artifact), manifest.read(artifact).contract.kv.context_length
    session.feed(tokens(length - 1))
    session.feed([1])
    with pytest.raises(ValueError, match=f"context length {length}"):
        session.feed([1])
    with pytest.raises(ValueError, match="no tokens"):
        session.feed([])


def greedy(session, prompt: list[int], count: int) -> list[int]:
    out, logits = [], session.feed(prompt)
    for _ in range(count):
        out.append(int(logits.argmax()))
        logits = session.feed(out[-1:])
    return out


def test_onnxruntime_genai_generates_what_our_session_does(untied, tmp_path):
    """Greedy, up to the end-of-sequence id of genai_config.json: here one that our session does generate."""
    import onnxruntime_genai as og

    prompt = tokens(30, 250)
    ours = greedy(session_of(untied), prompt, 32)
    assert len(set(ours)) > 8, "a model that repeats itself proves nothing"
    folder = shutil.copytree(untied, tmp_path / "copy")
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["eos_token_id"] == list(manifest.read(untied).tokenizer.eos_ids)
    config["model"]["eos_token_id"] = [ours[20]]
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=62)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[30:].tolist() == ours[: ours.index(ours[20])]


def test_stock_clients_get_threads_that_sleep(artifact):
    config = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    options = config["model"]["decoder"]["session_options"]
    assert 0 < int(options["session.intra_op.spin_duration_us"]) < 1000
    assert options["intra_op_num_threads"] == 0


def test_onnxruntime_genai_reads_the_tokenizer_files(artifact):
    import onnxruntime_genai as og

    theirs, ours, text = og.Tokenizer(og.Model(str(artifact))), load_tokenizer(artifact), "Grüße aus Köln, 1 + 1 = 2"
    assert theirs.encode(text).tolist() == ours.encode(text)
    assert theirs.decode(theirs.encode(text)) == text


def test_logits_of_every_position_end_in_those_of_the_last(untied, all_logits):
    """Nothing but the outputs differs; shorter products may round otherwise in the last bit."""
    ids = tokens(PREFILL)
    last, every = (session_of(folder).feed(ids) for folder in (untied, all_logits))
    np.testing.assert_allclose(last, every, atol=1e-4)
    for folder, positions in ((untied, 1), (all_logits, PREFILL)):
        assert generate_prompt_logits(folder, ids).shape[1] == positions


def generate_prompt_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """What onnxruntime-genai has after a prompt."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=PREFILL + 1)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    return generator.get_output("logits")


def test_lm_evaluation_harness_scores_as_our_session_does(untied, lm_eval_model):
    from lm_eval.api.instance import Instance

    pairs = [("The cat sat", " on the mat"), ("Grüße aus", " Köln"), ("1 + 1 =", " 2")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scores = lm_eval_model.loglikelihood(requests, disable_tqdm=True)
    session, tokenizer = session_of(untied), load_tokenizer(untied)
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        session.reset()
        logits, total = session.feed(tokenizer.encode(context)), 0.0
        for token in tokenizer.encode(continuation):
            total += float(torch.tensor(logits).double().log_softmax(-1)[token])
            logits = session.feed([token])
        assert score == pytest.approx(total, rel=0.01)


def test_lm_evaluation_harness_generates_what_our_session_does(untied, lm_eval_model):
    from lm_eval.api.instance import Instance

    tokenizer = load_tokenizer(untied)
    request = Instance("generate_until", {}, ("The cat sat", {"until": [], "max_gen_toks": 12}), 0)
    text = lm_eval_model.generate_until([request], disable_tqdm=True)[0]
    ours = greedy(session_of(untied), tokenizer.encode("The cat sat"), 12)
    assert text == tokenizer.decode(ours, skip_special_tokens=True)


def test_the_same_inputs_give_the_same_bytes(artifact, tmp_path):
    again = export(tiny(), None, tmp_path / "again")
    assert again.files == manifest.read(artifact).files


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"linear": plan.WeightScheme(bits=4, group_size=48)}, "q_proj.weight has groups of 48.*use one of those"),
        ({"linear": plan.WeightScheme(bits=4, group_size=8)}, "groups of 8"),
        ({"linear": plan.WeightScheme(bits=4, group_size=512)}, "groups of 512"),
        ({"shape": {"hidden_size": 264}}, "embed_tokens.weight is per channel with 264 input features"),
        ({"shape": {"head_dim": 24}}, "head_dim 24.*executorch-xnnpack"),
        ({"activations": "int8-per-token"}, "activations is 'int8-per-token'.*set it to none"),
    ],
)
def test_what_onnxruntime_cannot_hold_is_refused_before_any_work(change, says):
    p = tiny(linear=change.get("linear"))
    architecture = p.model.architecture.model_copy(update=change.get("shape", {}))
    if "activations" in change:
        p = p.model_copy(update={"target": p.target.model_copy(update={"activations": change["activations"]})})
    with pytest.raises(ExportError, match=says):
        onnx_kv.check(p, architecture)


@pytest.mark.slow
def test_real_weights_keep_their_logits(tmp_path):
    export(plan.load_plan("smollm2-135m", "int4-g32", "onnx-cpu"), None, tmp_path / "smollm2")
    text = (Path(__file__).parent.parent / "export" / "model.py").read_text(encoding="utf-8")
    ids = load_tokenizer(tmp_path / "smollm2").encode(text)[: PREFILL + 200]
    kl, _, sqnr = compare(tmp_path / "smollm2", ids)
    assert_same_integers(tmp_path / "smollm2")
    assert kl <= 0.01  # int8 activations of onnxruntime; code scatters more than prose
    assert sqnr >= 20
