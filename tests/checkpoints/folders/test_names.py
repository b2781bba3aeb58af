"""Tensor names as training left them: read where every tensor has them, named where not."""

import pytest
import torch

from export import checkpoints
from export.architecture import EMBEDDING, HEAD
from export.checkpoints.origin import parse_origin
from tests.support.checkpoints import LLAMA, SMALL, refusal, weights, write_bnb, write_folder
from tests.support.reliability import NOT_DAMAGED

pytestmark = NOT_DAMAGED

UNTIED = SMALL.model_copy(update={"tie_word_embeddings": False})
WRAPPED = "names of tensors hold training wrappers (_orig_mod, _fsdp_wrapped_module …), which are left out"


def prefixed(prefix):
    return lambda name: prefix + name


def left_out(prefix):
    return f"names of tensors begin with {prefix!r}, which is left out"


SPELLINGS = {
    "torch.compile": (prefixed("_orig_mod."), WRAPPED),
    "compiled layers": (lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."), WRAPPED),
    "FSDP": (
        lambda name: "_fsdp_wrapped_module." + name.replace("layers.0.", "layers.0._fsdp_wrapped_module."), WRAPPED
    ),
    "checkpointing": (lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."), WRAPPED),
    "DDP": (prefixed("module."), left_out("module.")),
    "a trainer's model": (prefixed("model."), left_out("model.")),
    "a merged PEFT model": (prefixed("base_model.model."), left_out("base_model.model.")),
    "a name": (prefixed("llama."), left_out("llama.")),
}  # fmt: skip


@pytest.mark.parametrize("architecture", [SMALL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", SPELLINGS)
def test_what_every_name_has_is_left_out_and_said(tmp_path, kind, architecture):
    change, note = SPELLINGS[kind]
    tensors = weights(architecture)
    folder = write_folder(tmp_path / "c", architecture, tensors={change(name): t for name, t in tensors.items()})
    opened = checkpoints.load(LLAMA, parse_origin(str(folder)))
    assert opened.notes == (note,)
    for name, tensor in tensors.items():
        assert torch.equal(opened.read(name), tensor.bfloat16().float())


@pytest.mark.parametrize("architecture", [SMALL, UNTIED], ids=["tied", "untied"])
def test_a_model_without_its_head_class_is_read_as_transformers_does(tmp_path, architecture):
    from transformers import LlamaForCausalLM

    tensors = {name.removeprefix("model."): tensor for name, tensor in weights(architecture).items()}
    folder = write_folder(tmp_path / "c", architecture, tensors=tensors)
    opened = checkpoints.load(LLAMA, parse_origin(str(folder)))
    assert opened.notes == ("names of tensors lack 'model.', which is put before them as transformers does",)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(opened.read(name), theirs[name]) for name in opened.architecture.tensor_shapes())


def test_names_and_tables_may_both_be_others(tmp_path):
    tensors = {f"module.{HEAD if name == EMBEDDING else name}": tensor for name, tensor in weights().items()}
    opened = checkpoints.load(LLAMA, parse_origin(str(write_folder(tmp_path / "c", tensors=tensors))))
    assert torch.equal(opened.read(EMBEDDING), weights()[EMBEDDING])
    assert len(opened.notes) == 2


def test_quantized_weights_are_read_under_their_names_too(tmp_path):
    from safetensors.torch import load_file, save_file

    plain = checkpoints.load(LLAMA, parse_origin(str(write_bnb(tmp_path / "plain"))))
    folder = write_bnb(tmp_path / "c")
    stored = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{name}": tensor for name, tensor in stored.items()}, folder / "model.safetensors")
    opened = checkpoints.load(LLAMA, parse_origin(str(folder)))
    for name in SMALL.tensor_shapes():
        assert torch.equal(opened.read(name), plain.read(name))
        assert (opened.integers(name) is None) == (plain.integers(name) is None)


def unmerged():
    tensors = {}
    for name, tensor in weights().items():
        if "_proj" not in name:
            tensors[f"base_model.model.{name}"] = tensor
            continue
        linear = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{linear}.base_layer.weight"] = tensor
        tensors[f"{linear}.lora_A.default.weight"] = torch.zeros(4, tensor.shape[1])
        tensors[f"{linear}.lora_B.default.weight"] = torch.zeros(tensor.shape[0], 4)
    return tensors


REFUSED = {
    "unmerged": (
        unmerged,
        "a LoRA adapter that is not merged; call `merge_and_unload` before `save_pretrained`, or save the adapter "
        "alone and give it with --adapter",
    ),
    "a part of a larger model": (
        lambda: {f"language_model.{n}": t for n, t in weights().items()} | {"vision_tower.a": torch.ones(2)},
        "the model's names begin with 'language_model.', but 'vision_tower.a' does not; save the language model alone",
    ),
    "twice": (
        lambda: weights() | {f"_orig_mod.{n}": t.clone() for n, t in weights().items()},
        "some tensors are there under two names; save the model again",
    ),
    "other names": (
        lambda: {f"tok.{i}": t for i, t in enumerate(weights().values())},
        "11 tensors are missing: model.embed_tokens.weight, model.layers.0.input_layernorm.weight, "
        "model.layers.0.mlp.down_proj.weight and 8 more; there are instead: tok.0, tok.1, tok.10 and 8 more",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_names_that_are_not_read_are_shown(tmp_path, kind):
    make, words = REFUSED[kind]
    folder = write_folder(tmp_path / "c", tensors=make())
    assert refusal(LLAMA, folder) == f"{folder}: {words}"


def test_a_weight_without_numbers_is_named(tmp_path):
    tensors = weights() | {"model.norm.weight": torch.empty(0)}
    words = (
        "tensor model.norm.weight has shape [0], the architecture needs [64]; it is empty: saved under DeepSpeed ZeRO-3"
    )
    assert words in refusal(LLAMA, write_folder(tmp_path / "c", tensors=tensors))
