"""LoRA adapters as peft writes them, and what is done to them."""

from functools import partial

import torch

from export import checkpoints
from export.checkpoints.origin import adapted, parse_origin
from tests.support import harms
from tests.support.checkpoints import LLAMA, SMALL
from tests.support.harms import fields

UNTIED = SMALL.model_copy(update={"tie_word_embeddings": False, "num_hidden_layers": 2})
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(base, folder, *, seed=0, **options):
    """An adapter as if trained: every matrix random. Returns its model, merged by peft."""
    import peft
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


Q = "base_model.model.model.layers.0.self_attn.q_proj."
WEIGHTS = "adapter_model.safetensors"


configure = partial(fields, "adapter_config.json")
tensors = partial(harms.tensors, name=WEIGHTS)


def add(name, *shape, dtype=torch.float32):
    return tensors(lambda t: t.update({name: torch.ones(shape, dtype=dtype)}))
