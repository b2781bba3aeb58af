"""Embedding and head: an adapter that changes one of a tied pair, or resizes both."""

import pytest
import torch

from export import checkpoints
from export.checkpoints.origin import adapted, parse_origin
from export.quantization.eager import eager
from tests.checkpoints.lora.adapters import add, assert_peft, tensors, train
from tests.support.checkpoints import LLAMA, refusal, weights
from tests.support.reliability import NOT_DAMAGED

peft = pytest.importorskip("peft", reason="peft (the judge of its own format) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


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
