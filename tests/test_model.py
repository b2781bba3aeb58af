"""Our Llama computes what transformers' and Meta's own code compute."""

import math

import numpy as np
import pytest
import torch

from export import checkpoints
from export.architecture import Architecture, RopeScaling
from export.checkpoints.seed import SeededSource
from export.model import Llama, rope_frequencies, rope_tables
from export.plan import ModelSpec, load_named
from export.quantization.eager import eager
from runtime_tests.reference import hugging_face

META = Architecture(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=500000.0,
    # llama-models writes these numbers into its code (`apply_scaling`)
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=131072,
)


def cached(model: Llama, tokens: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits of prefill, then one token at a time."""
    with torch.no_grad():
        logits, cache = model(tokens[:, :prefill])
        parts = [logits]
        for i in range(prefill, tokens.shape[1]):
            logits, cache = model(tokens[:, i : i + 1], cache)
            parts.append(logits)
    return torch.cat(parts, dim=1)


def seeded(name: str) -> checkpoints.Checkpoint:
    return checkpoints.load(load_named(ModelSpec, "models", name), None)


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_logits_equal_transformers(name):
    weights = seeded(name)
    a = weights.architecture
    tokens = torch.randint(0, a.vocab_size, (1, 160), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hugging_face(weights)(tokens)
        ours, _ = eager(weights.read, a, "none")(tokens)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert expected.std() > 0.1  # not equal because both are flat


@pytest.mark.parametrize("window", [None, 24])
def test_cached_decode_at_depth_equals_transformers(window):
    weights = seeded("tiny")
    a = weights.architecture
    # past original_max_position_embeddings (64), so that scaled RoPE is seen at work
    tokens = torch.randint(0, a.vocab_size, (2, 200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = hugging_face(weights, window)(tokens)
    assert (cached(eager(weights.read, a, "none", window), tokens, 120) - expected).abs().max() <= 1e-4


def test_a_stale_cache_slot_is_seen():
    weights = seeded("tiny")
    model = eager(weights.read, weights.architecture, "none")
    tokens = torch.randint(0, 512, (1, 80), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full, _ = model(tokens)
        _, cache = model(tokens[:, :-1])
        cache[0][0][:, :, 10] = cache[0][0][:, :, 11]
        stale, _ = model(tokens[:, -1:], cache)
    assert (stale[:, -1] - full[:, -1]).abs().max() > 1e-3


def test_rope_tables_are_exact_to_the_last_bit():
    """float32 angles as in Hugging Face's code; torch's own cos may be off by 1e-4 in the first call of a process."""
    angles = np.outer(np.arange(300, dtype=np.float32), rope_frequencies(META).numpy())
    cos, sin = rope_tables(META, 300)
    for table, function in ((cos, math.cos), (sin, math.sin)):
        exact = [np.float32(function(float(angle))) for angle in angles.ravel()]
        assert table.dtype == torch.float32
        assert np.array_equal(table.numpy().ravel(), np.array(exact))


def test_a_step_computes_tables_for_its_own_positions_only(monkeypatch):
    """Bit for bit those of the whole context: 131,072 positions for each token of a reference would take most of it."""
    made, whole = [], rope_tables(META, 131072)

    def tables(*arguments):
        made.append((arguments[1:], rope_tables(*arguments)))
        return made[-1][1]

    monkeypatch.setattr("export.model.rope_tables", tables)
    cached(eager(SeededSource("1", META).read, META, "none"), torch.zeros(1, 9, dtype=torch.int64), 7)
    assert [len(cos) for _, (cos, _) in made] == [7, 1, 1]
    for first in (7, 8, 32_767, 65_504, 131_071):
        for part, table in zip(rope_tables(META, first + 1, first=first), whole, strict=True):
            assert torch.equal(part, table[first : first + 1])


def test_wrong_rope_scaling_is_seen():
    weights = seeded("tiny")
    a = weights.architecture
    tokens = torch.randint(0, a.vocab_size, (1, 160), generator=torch.Generator().manual_seed(4))
    unscaled = a.model_copy(update={"rope_scaling": None})
    with torch.no_grad():
        ours, _ = eager(weights.read, a, "none")(tokens)
        wrong, _ = eager(weights.read, unscaled, "none")(tokens)
    assert (ours - wrong).abs().max() > 1e-2


def meta_names(name: str) -> str:
    pairs = {
        "model.embed_tokens": "tok_embeddings",
        "model.layers": "layers",
        "model.norm": "norm",
        "lm_head": "output",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs) if name.startswith(("model", "lm_head")) or ours in name else name
    return name


def pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves → interleaved pairs, Meta's order of rows."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def test_logits_equal_metas_reference(one_process):
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    source = SeededSource("5", META)
    args = ModelArgs(
        dim=128,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=300,
        multiple_of=256,
        ffn_dim_multiplier=0.5,
        norm_eps=1e-5,
        rope_theta=500000.0,
        use_scaled_rope=True,
        max_batch_size=1,
        max_seq_len=256,
    )
    theirs = Transformer(args).eval()
    state = {}
    for name in META.tensor_shapes():
        weight = source.read(name)
        if name.endswith("q_proj.weight"):
            weight = pairs_together(weight, META.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = pairs_together(weight, META.num_key_value_heads)
        state[meta_names(name)] = weight
    theirs.load_state_dict(state)
    tokens = torch.randint(0, 300, (1, 150), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = torch.cat([theirs(tokens[:, :100], 0), theirs(tokens[:, 100:], 100)], dim=1)
    assert (cached(eager(source.read, META, "none"), tokens, 100) - expected).abs().max() <= 1e-4
