"""An adapter that does not fit its base, or asks for more than a merge, is refused by name."""

import shutil

import pytest
import torch

from export import checkpoints
from export.checkpoints import open_source
from export.checkpoints.origin import adapted, parse_origin
from export.errors import ExportError
from tests.checkpoints.lora.adapters import WEIGHTS, Q, add, configure, tensors, train
from tests.support.checkpoints import LLAMA, refusal, set_config
from tests.support.harms import put, remove
from tests.support.reliability import NOT_DAMAGED

peft = pytest.importorskip("peft", reason="peft (the judge of its own format) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


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
