"""A LoRA adapter is merged as peft merges it; one that does not fit its base, or asks for more, is refused by name."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch

from export import checkpoints, manifest, pipeline
from export.__main__ import app
from export.build.command import run as run_app
from export.checkpoints import open_source, tokenizer
from export.checkpoints.origin import adapted, parse_origin
from export.errors import ExportError
from export.plan import load_plan
from export.quantization.eager import eager
from runtime_tests.checks import weights as proof
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import SourceError
from tests.support import harms
from tests.support.checkpoints import (
    LLAMA,
    SMALL,
    TOKENIZER_FILES,
    refusal,
    set_config,
    weights,
    write_bnb,
    write_folder,
    write_gguf,
)
from tests.support.harms import fields, put, remove
from tests.support.reliability import NOT_DAMAGED

peft = pytest.importorskip("peft", reason="peft (the judge of its own format) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")

UNTIED = SMALL.model_copy(update={"tie_word_embeddings": False, "num_hidden_layers": 2})
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(base, folder, *, seed=0, **options):
    """An adapter as if trained: every matrix random. Returns its model, merged by peft."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS} | options
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base") / "untied", UNTIED)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base") / "tied")


def assert_peft(base, adapter, merged, changed):
    """Every weight is the one peft merges; `changed` of them differ from the base's."""
    opened = checkpoints.load(LLAMA, adapted(parse_origin(str(base)), adapter))
    plain = checkpoints.load(LLAMA, parse_origin(str(base)))
    theirs, count = merged.state_dict(), 0
    for name in opened.architecture.tensor_shapes():
        weight = opened.read(name)
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)
        count += not torch.equal(weight, plain.read(name))
    assert count == changed
    return opened


KINDS = {
    "plain": ({}, 14, "LoRA for local:{base.name} merged into 14 of 14 linears"),
    "some modules": ({"target_modules": ["q_proj", "v_proj"]}, 4, "for local:{base.name} merged into 4 of 14 linears"),
    "one layer": ({"layers_to_transform": [1]}, 7, "merged into 7 of 14 linears"),
    "rslora": ({"use_rslora": True, "r": 9}, 14, "rsLoRA for"),
    "dora": ({"use_dora": True}, 14, "DoRA for"),
    "ranks and alphas by module": (
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
         "alpha_pattern": {"^model.layers.0.mlp.up_proj": 3, "o_proj|k_proj": 32.5}}, 14, "merged into 14 of 14",
    ),
    "rslora by module": ({"use_rslora": True, "rank_pattern": {"mlp.*": 3}}, 14, "rsLoRA for"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, 14, "merged into 14 of 14"),
    "head and embedding": (
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, 4, "2 of 14 linears and 2 other weights",
    ),
    "whole modules": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}, 5,
        "merged into 2 of 14 linears and 3 other weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_merges(base, tmp_path, kind):
    options, changed, words = KINDS[kind]
    merged = train(base, tmp_path / "adapter", **options)
    opened = assert_peft(base, tmp_path / "adapter", merged, changed)
    assert words.format(base=base) in opened.source.description
    assert set(opened.sha256) == {
        "config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES,
    }  # fmt: skip


def test_merged_logits_are_those_of_the_unmerged_model(tied, tmp_path):
    """As in training: base and adapter side by side in peft's own forward."""
    from transformers import LlamaForCausalLM

    train(tied, tmp_path / "adapter")
    side_by_side = peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tied, dtype=torch.float32), tmp_path / "adapter"
    ).eval()
    opened = checkpoints.load(LLAMA, adapted(parse_origin(str(tied)), tmp_path / "adapter"))
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = side_by_side(tokens).logits
        plain = checkpoints.load(LLAMA, parse_origin(str(tied)))
        assert (eager(opened.read, opened.architecture, "none")(tokens)[0] - expected).abs().max() < 1e-4
        assert (eager(plain.read, plain.architecture, "none")(tokens)[0] - expected).abs().max() > 0.1


def test_into_a_gguf_and_into_a_4_bit_base(tied, tmp_path):
    """As Unsloth trains on 4-bit downloads: the base is what bitsandbytes dequantizes, and is not rounded again."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    merged = train(tied, tmp_path / "adapter").state_dict()
    original = checkpoints.load(LLAMA, parse_origin(str(tied)))
    for place in (write_gguf(tmp_path / "model.gguf"), write_bnb(tmp_path / "bnb")):
        plain = checkpoints.load(LLAMA, parse_origin(str(place)))
        opened = checkpoints.load(LLAMA, adapted(parse_origin(str(place)), tmp_path / "adapter"))
        assert opened.source.description.startswith(plain.source.description)
        for name in opened.architecture.tensor_shapes():
            expected = plain.read(name) + (merged[name] - original.read(name))
            torch.testing.assert_close(opened.read(name), expected, rtol=1e-5, atol=1e-6)


def test_the_base_stays_as_it_is(base, tmp_path):
    train(base, tmp_path / "adapter")
    opened = checkpoints.load(LLAMA, adapted(parse_origin(str(base)), tmp_path / "adapter"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(opened.read(name), opened.read(name))
    assert torch.equal(checkpoints.load(LLAMA, parse_origin(str(base))).read(name), weights(UNTIED)[name])


def test_the_tokenizer_is_the_one_saved_with_the_adapter(tied, tmp_path):
    train(tied, tmp_path / "adapter")
    spec = adapted(parse_origin(str(tied)), tmp_path / "adapter")
    for folder in ("base", "own"):
        (tmp_path / folder).mkdir()
    tokenizer.write(open_source(spec, None), tmp_path / "base", 288)
    assert "<|assistant|>" in tokenizer.load(tmp_path / "base").chat_template
    for path in tied.iterdir():
        if path.name.startswith("tokenizer"):
            shutil.copy(path, tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ 'mine' }}")
    (tied / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    try:
        opened = open_source(spec, None)
        ids = tokenizer.write(opened, tmp_path / "own", 288)
    finally:
        (tied / "generation_config.json").unlink()
    own = {path.name for path in opened.files if path.parent == tmp_path / "adapter"}
    assert own > {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in opened.files} - own == {"config.json", "model.safetensors", "generation_config.json"}
    assert tokenizer.load(tmp_path / "own").chat_template == "{{ 'mine' }}"
    assert ids.eos_ids == (257, 258)


def test_the_command_builds_an_artifact_that_validation_can_rebuild(tied, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr(pipeline, "CACHE", tmp_path / "cache")
    train(tied, tmp_path / "adapter")
    words = ["export", "llama", "int4-g32", "onnx-cpu", "--source", tied, "--adapter", tmp_path / "adapter"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--out", str(tmp_path / "out")])
    assert run_app(app) == 0
    described = manifest.read(tmp_path / "out")
    assert described.checkpoint.description.endswith(f"LoRA for local:{tied.name} merged into 7 of 7 linears")
    assert "adapter_model.safetensors" in described.checkpoint.sha256
    plain = pipeline.export(load_plan("llama", "int4-g32", "onnx-cpu"), parse_origin(str(tied)), tmp_path / "plain")
    assert plain.quantization.key != described.quantization.key
    model = proof.rebuild(described, None, tmp_path / "cache")
    assert model.key == described.quantization.key
    train(tied, tmp_path / "adapter", seed=1)
    with pytest.raises(SourceError) as refusal:
        proof.rebuild(described, None, tmp_path / "cache")
    assert (refusal.value.outcome, str(refusal.value)) == (
        Outcome.SOURCE_DIFFERS,
        f"{tmp_path}/adapter/adapter_model.safetensors: changed: not the checkpoint that {described.id} was built "
        "from; build it again, or give that one with --source and --adapter",
    )


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    train(base, folder)
    return folder


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "adapter")


Q = "base_model.model.model.layers.0.self_attn.q_proj."
WEIGHTS = "adapter_model.safetensors"


configure = partial(fields, "adapter_config.json")
tensors = partial(harms.tensors, name=WEIGHTS)


def add(name, *shape, dtype=torch.float32):
    return tensors(lambda t: t.update({name: torch.ones(shape, dtype=dtype)}))


BROKEN = {
    "no configuration": (remove("adapter_config.json"), "adapter_config.json: missing; --adapter must be"),
    "configuration no JSON": (put("adapter_config.json", b"{"), "adapter_config.json: not valid JSON"),
    "configuration a list": (put("adapter_config.json", b"[]"), "expected a JSON object"),
    "no weights": (remove(WEIGHTS), "adapter_model.safetensors: missing"),
    "pickled weights": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "missing; pickled weights are never loaded",
    ),
    "weights damaged": (put(WEIGHTS, b"\xff" * 100), "adapter_model.safetensors: damaged safetensors"),
    "weights cut": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]), "damaged safetensors",
    ),
    "another method": (configure(peft_type="IA3"), "peft_type: 'IA3' is unknown (known: LORA)"),
    "an adapter of mlx-lm": (
        put("adapter_config.json", b'{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}'),
        "adapter_config.json: an adapter of mlx-lm, which is not merged here; fuse it with `mlx_lm.fuse`",
    ),
    "no method": (configure(peft_type=None), "peft_type: Input should be 'LORA'"),
    "biases": (configure(bias="all"), "bias: 'all' is unknown (known: none)"),
    "lora_bias": (configure(lora_bias=True), "lora_bias is True, which is not merged here"),
    "PiSSA": (configure(init_lora_weights="pissa"), "init_lora_weights is 'pissa': training has changed the base"),
    "LoftQ": (configure(init_lora_weights="loftq"), "init_lora_weights is 'loftq'"),
    "replicated layers": (configure(layer_replication=[[0, 2], [1, 2]]), "layer_replication is [[0, 2], [1, 2]]"),
    "trained tokens": (configure(trainable_token_indices=[5]), "trainable_token_indices is [5]"),
    "parameters": (configure(target_parameters=["x"]), "target_parameters is ['x']"),
    "aLoRA": (configure(alora_invocation_tokens=[1]), "alora_invocation_tokens is [1]"),
    "QALoRA": (configure(use_qalora=True), "use_qalora is True"),
    "a key of tomorrow": (configure(use_somelora=True), "use_somelora is True, which is not merged here"),
    "rank 0": (configure(r=0), "r: Input should be greater than 0"),
    "rank of words": (configure(r="many"), "r: Input should be a valid integer"),
    "alpha NaN": (configure(lora_alpha=float("nan")), "lora_alpha: Input should be a finite number"),
    "no alpha": (configure(lora_alpha=None), "lora_alpha: "),
    "another rank": (configure(r=8), "this base and rank 8 need [8, 128]"),
    "another rank somewhere": (configure(rank_pattern={"up_proj": 3}), "rank 3 need [3, 64]"),
    "ranks as a list": (configure(rank_pattern=[1]), "rank_pattern: "),
    "a pattern that is none": (configure(alpha_pattern={"(": 1}), "the pattern '(' is no plain name"),
    "a pattern without end": (configure(alpha_pattern={"(a+)+x": 1}), "the pattern '(a+)+x' is no plain name"),
    "a slow pattern": (configure(alpha_pattern={".*.*.*x": 1}), "the pattern '.*.*.*x' is no plain name"),
    "alternatives without end": (
        configure(rank_pattern={"(.|.)" * 30 + "!": 2}), "is no plain name of modules",
    ),
    "endless patterns": (
        configure(alpha_pattern={f"m{i}": 1 for i in range(20_000)}), "20000 patterns of ranks and alphas, at most 4",
    ),
    "a long pattern": (configure(rank_pattern={"x" * 201: 1}), "is no plain name of modules"),
    "no tensors": (tensors(lambda t: t.clear()), "the adapter holds no tensors"),
    "a layer too many": (
        add(Q.replace("layers.0", "layers.9") + "lora_A.weight", 4, 64),
        "layers.9.self_attn.q_proj.lora_A.weight changes nothing that this base has",
    ),
    "an expert": (
        add("base_model.model.model.layers.0.mlp.experts.0.lora_A.weight", 4, 64),
        "mlp.experts.0.lora_A.weight changes nothing that this base has",
    ),
    "another prefix": (
        tensors(lambda t: t.update({name.removeprefix("base_model.model."): t.pop(name) for name in list(t)})),
        "changes nothing that this base has",
    ),
    "a bias": (add(Q + "lora_B.bias", 64), "q_proj.lora_B.bias changes nothing"),
    "A alone": (tensors(lambda t: t.pop(Q + "lora_B.weight")), "has no lora_B.weight for model.layers.0"),
    "B alone": (tensors(lambda t: t.pop(Q + "lora_A.weight")), "has no lora_A.weight for model.layers.0"),
    "A of another base": (
        add(Q + "lora_A.weight", 4, 128), "has shape [4, 128], this base and rank 4",
    ),
    "B of another base": (
        add(Q + "lora_B.weight", 128, 4), "has shape [128, 4], this base and rank 4",
    ),
    "B of three dimensions": (
        add(Q + "lora_B.weight", 64, 4, 1), "has shape [64, 4, 1]",
    ),
    "a magnitude without DoRA": (
        add(Q + "lora_magnitude_vector", 64), "is not merged into",
    ),
    "a scaling beyond float32": (configure(lora_alpha=1e308), "_proj.weight: the adapter is scaled by 2.5e+307"),
    "DoRA without magnitudes": (configure(use_dora=True), "has no lora_magnitude_vector for"),
    "LoRA on a norm": (
        add("base_model.model.model.norm.lora_A.weight", 4, 64), "is not merged into",
    ),
    "an embedding's matrices on a linear": (
        add(Q + "lora_embedding_A", 4, 64), "is not merged into",
    ),
    "more tokens": (
        add("base_model.model.lm_head.weight", 290, 64),
        "lm_head.weight is for 290 tokens, this base has 288; if training resized the vocabulary, call "
        "`resize_token_embeddings(290)` on the base, then merge with peft",
    ),
    "integers": (
        add(Q + "lora_A.weight", 4, 64, dtype=torch.int8), "is torch.int8; only float",
    ),
    "NaN": (
        tensors(lambda t: t[Q + "lora_A.weight"].fill_(float("nan"))), "layers.0.self_attn.q_proj.weight holds NaN",
    ),
}  # fmt: skip


@pytest.mark.hostile(
    "adapter", "patterns that never end, numbers out of range, tensors that do not fit", "refused by name"
)
@pytest.mark.parametrize("mistake", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused_by_name(base, adapter, mistake):
    change, words = BROKEN[mistake]
    change(adapter)
    assert words in refusal(LLAMA, adapted(parse_origin(str(base)), adapter))


def test_without_any_change_it_is_merged(base, adapter):
    """The twin: writing the tensors and the configuration again is no mistake."""
    configure()(adapter)
    tensors(lambda _: None)(adapter)
    assert "14 of 14" in checkpoints.load(LLAMA, adapted(parse_origin(str(base)), adapter)).source.description


APART = {
    "LoRA on the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
    "LoRA on the head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "a new head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
    "both": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, "model.embed_tokens and lm_head"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_a_head(tied, tmp_path_factory):
    """The remedy of docs/checkpoints.md."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "with-a-head"
    model = LlamaForCausalLM.from_pretrained(tied, dtype="auto")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tied).save_pretrained(folder)
    return folder


def assert_side_by_side(base, adapter, place):
    """Logits of `place` with the adapter are those that peft computes for the unmerged adapter of `base`."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    opened, tokens = checkpoints.load(LLAMA, adapted(parse_origin(str(place)), adapter)), torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(model, adapter).eval()(tokens).logits
        assert (eager(opened.read, opened.architecture, "none")(tokens)[0] - expected).abs().max() < 1e-4


@NOT_DAMAGED
@pytest.mark.parametrize("kind", APART)
def test_a_tied_table_is_not_changed_on_one_side_and_the_remedy_works(tied, with_a_head, tmp_path, kind):
    options, modules = APART[kind]
    train(tied, tmp_path / "adapter", **options)
    assert refusal(LLAMA, adapted(parse_origin(str(tied)), tmp_path / "adapter")) == (
        f"{tmp_path / 'adapter'}: the adapter changes {modules}, but embedding and head are one table in this base; "
        "save the base with a head of its own (docs/checkpoints.md, LoRA adapters) and give that with --source"
    )
    assert_side_by_side(tied, tmp_path / "adapter", with_a_head)


@NOT_DAMAGED
@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_one_new_table_for_embedding_and_head_is_used(tied, tmp_path, modules):
    options = {"target_modules": ["q_proj"], "modules_to_save": modules, "ensure_weight_tying": True}
    train(tied, tmp_path / "adapter", **options)
    assert_side_by_side(tied, tmp_path / "adapter", tied)


@NOT_DAMAGED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_a_tied_table_change_nothing(tied, tmp_path, dtype):
    """As `save_embedding_layers` leaves them."""
    merged = train(tied, tmp_path / "adapter")
    table = weights()["model.embed_tokens.weight"].to(dtype)
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    tensors(lambda t: t.update({name: table.clone() for name in names}))(tmp_path / "adapter")
    assert "merged into 7 of 7 linears" in assert_peft(tied, tmp_path / "adapter", merged, 7).source.description


RESIZED = (
    "is for 289 tokens, this base has 288; if training resized the vocabulary, call `resize_token_embeddings(289)`"
)


@NOT_DAMAGED
@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_a_resized_vocabulary_says_what_to_do(tied, base, tmp_path, module):
    """Before a tied base is mentioned: the number of tokens is the reason."""
    train(tied, tmp_path / "adapter")
    add(f"base_model.model.{module}.weight", 289, 64)(tmp_path / "adapter")
    for place in (tied, base):
        assert RESIZED in refusal(LLAMA, adapted(parse_origin(str(place)), tmp_path / "adapter"))


@NOT_DAMAGED
def test_the_remedy_for_a_resized_vocabulary_works(tied, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tied, dtype=torch.float32)
    model.resize_token_embeddings(289)
    trained = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert RESIZED in refusal(LLAMA, adapted(parse_origin(str(tied)), tmp_path / "adapter"))
    larger = LlamaForCausalLM.from_pretrained(tied, dtype=torch.float32)
    larger.resize_token_embeddings(289)
    merged = peft.PeftModel.from_pretrained(larger, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    opened = checkpoints.load(LLAMA, parse_origin(str(tmp_path / "merged")))
    assert torch.equal(opened.read("model.embed_tokens.weight"), merged.model.embed_tokens.weight.detach())


@NOT_DAMAGED
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_tensors_that_zero_3_has_not_gathered_are_named(base, adapter, part):
    empty = {name: torch.empty(0) for name in PARTS if part in name}
    tensors(lambda t: t.update(empty))(adapter)
    line = (
        "has shape [0]; it is empty: saved under DeepSpeed ZeRO-3 without gathering; save again with `zero_to_fp32.py`"
    )
    assert line in refusal(LLAMA, adapted(parse_origin(str(base)), adapter))


PARTS = (Q + "lora_A.weight", Q + "lora_B.weight")
SETTINGS = {
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99, "use_label_mask": True}},
    "settings of initializations that were not used": {
        "loftq_config": {"loftq_bits": 4}, "corda_config": {"cache_file": "x"}, "lora_ga_config": {"scale": "x"},
    },
    "another case": {"init_lora_weights": "Gaussian"},
    "tied by a flag": {"ensure_weight_tying": True},
    "peft 0.2": {"enable_lora": None, "merge_weights": False, "target_modules": ["q_proj"], "bias": "none"},
    "keys of tomorrow without a value": {"use_somelora": False, "some_config": None, "some_list": [], "a": {}, "b": 0},
    "every key of peft today": peft.LoraConfig().to_dict() | {"peft_type": "LORA", "r": 4, "lora_alpha": 8},
}  # fmt: skip


@NOT_DAMAGED
@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_without_effect_are_merged_as_ever(base, trained, adapter, kind):
    configure(**SETTINGS[kind])(adapter)
    opened = checkpoints.load(LLAMA, adapted(parse_origin(str(base)), adapter))
    plain = checkpoints.load(LLAMA, adapted(parse_origin(str(base)), trained))
    assert torch.equal(opened.read("model.layers.0.self_attn.q_proj.weight"),
                       plain.read("model.layers.0.self_attn.q_proj.weight"))  # fmt: skip


def test_dora_on_an_embedding_is_refused(base, tmp_path):
    train(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], use_dora=True)
    text = refusal(LLAMA, adapted(parse_origin(str(base)), tmp_path / "adapter"))
    assert "lora_magnitude_vector is not merged into model.embed_tokens" in text


def test_an_adapter_of_a_larger_base(base, tied, adapter):
    """The adapter has two layers, the base has one."""
    text = refusal(LLAMA, adapted(parse_origin(str(tied)), adapter))
    assert "layers.1.mlp.down_proj.lora_A.weight changes nothing that this base has; merge with peft" in text


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("adapter:", "expected adapter:FOLDER//CHECKPOINT"),
        (
            "adapter:/tmp",
            "/tmp/adapter_config.json: missing; --adapter must be a folder that peft's save_pretrained wrote",
        ),
        ("adapter:///tmp", "expected adapter:FOLDER//CHECKPOINT"),
        ("adapter:/no/such//BASE", "/no/such: no such folder; download the adapter"),
        ("adapter:no/such//BASE", "no/such: no such folder; download the adapter"),
        ("adapter:/tmp//seed:3", "an adapter is merged into a checkpoint, not into seed:"),
        ("adapter:/tmp//adapter:/tmp//BASE", "not into adapter:"),
        ("adapter:/tmp///no/such", "/no/such: no such file or folder"),
    ],
)
def test_a_spec_that_names_nothing(base, spec, words):
    with pytest.raises(ExportError, match=words):
        open_source(parse_origin(spec.replace("BASE", str(base))), None)


def test_an_adapter_as_the_source_says_what_to_do(adapter):
    assert "a LoRA adapter, not a model; give it with --adapter" in refusal(LLAMA, adapter)


def test_the_base_is_still_checked(base, adapter, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    set_config(other, num_hidden_layers=3)
    assert "tensors are missing" in refusal(LLAMA, adapted(parse_origin(str(other)), adapter))
