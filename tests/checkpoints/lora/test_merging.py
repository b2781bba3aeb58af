"""A LoRA adapter is merged as peft merges it."""

import json
import shutil
import sys

import pytest
import torch

from export import checkpoints, manifest, pipeline
from export.__main__ import app
from export.build.command import run as run_app
from export.checkpoints import open_source, tokenizer
from export.checkpoints.origin import adapted, parse_origin
from export.plan import load_plan
from export.quantization.eager import eager
from runtime_tests.checks import weights as proof
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import SourceError
from tests.checkpoints.lora.adapters import UNTIED, assert_peft, train
from tests.support.checkpoints import LLAMA, TOKENIZER_FILES, weights, write_bnb, write_gguf

peft = pytest.importorskip("peft", reason="peft (the judge of its own format) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


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
