"""A checkpoint reads back to the same numbers whatever its form; its tokenizer is the one it states."""

import hashlib
import json

import gguf
import psutil
import pytest
import torch
from safetensors.torch import save_file

from export import checkpoints
from export.architecture import RopeScaling
from export.checkpoints import open_source, tokenizer
from export.checkpoints.integers import in_meta_order, pairs_together
from export.checkpoints.origin import parse_origin
from export.plan import ModelSpec, load_named
from export.toolbox import writers
from tests.support.checkpoints import LLAMA, SMALL, TOKENIZER_FILES, weights, write_folder, write_gguf

UNTIED = SMALL.model_copy(update={"tie_word_embeddings": False, "num_hidden_layers": 2})


def read_all(place):
    opened = checkpoints.load(LLAMA, parse_origin(str(place)))
    assert set(opened.source.shapes) >= set(opened.architecture.tensor_shapes())
    return opened, {name: opened.read(name) for name in opened.architecture.tensor_shapes()}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == torch.float32
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("architecture", [SMALL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_folder_of_any_float_type_reads_back(tmp_path, dtype, architecture):
    opened, tensors = read_all(write_folder(tmp_path / "one", architecture, dtype=dtype))
    assert opened.architecture == architecture
    assert_same(tensors, weights(architecture))


def test_shards_read_back_and_every_file_is_hashed(tmp_path):
    folder = write_folder(tmp_path / "many", UNTIED, shards=3)
    opened, tensors = read_all(folder)
    assert_same(tensors, weights(UNTIED))
    names = {"config.json", *(f"model-{i}.safetensors" for i in range(3)), *TOKENIZER_FILES}
    assert opened.sha256 == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("architecture", [SMALL, UNTIED], ids=["tied", "untied"])
def test_a_float_gguf_reads_back_with_its_rotary_pairs_put_right(tmp_path, kind, architecture):
    opened, tensors = read_all(write_gguf(tmp_path / "model.gguf", architecture, kind=kind))
    assert opened.architecture == architecture
    assert_same(tensors, weights(architecture))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_quantized_gguf_reads_back_as_its_rounding(tmp_path, kind):
    opened, tensors = read_all(write_gguf(tmp_path / "model.gguf", kind=kind))
    assert kind in opened.source.description
    for name, original in weights().items():
        if original.ndim == 1:
            torch.testing.assert_close(tensors[name], original, rtol=0, atol=0)
            continue
        # rows are permuted whole, so a row's rounding does not depend on where it stands
        kind_id = gguf.GGMLQuantizationType[kind]
        rounded = gguf.quants.dequantize(gguf.quants.quantize(original.numpy(), kind_id), kind_id)
        torch.testing.assert_close(tensors[name], torch.from_numpy(rounded), rtol=0, atol=0)
        assert not torch.equal(tensors[name], original)


@pytest.mark.parametrize(
    ("factor", "length", "theta", "size"),
    [(32.0, 8192, 500000.0, 64), (8.0, 8192, 500000.0, 128), (32.0, 64, 500000.0, 32), (4.0, 100, 1e4, 16),
     (2.5, 2048, 1e6, 80)],
)  # fmt: skip
def test_rope_scaling_is_recovered_from_a_ggufs_factors(tmp_path, factor, length, theta, size):
    """Llama 3.2's, Llama 3.1's and others, read back to exactly the same numbers."""
    scaling = RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=length
    )
    change = {"rope_theta": theta, "rope_scaling": scaling, "head_dim": size, "num_attention_heads": 2}
    architecture = SMALL.model_copy(update=change)
    keys = {"llama.attention.key_length": size}
    opened, tensors = read_all(write_gguf(tmp_path / "model.gguf", architecture, extra=keys))
    assert opened.architecture == architecture
    assert_same(tensors, weights(architecture))


def test_factors_of_one_are_no_scaling(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", more={"rope_freqs.weight": torch.ones(8)})
    assert read_all(path)[0].architecture == SMALL


def test_a_gguf_without_the_permutation_would_be_other_numbers():
    """The negative twin: the writer's permutation moves rows."""
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(in_meta_order(q, weights()[q], SMALL), weights()[q])
    rows = pairs_together(torch.arange(12)[:, None], heads=2)
    assert rows.flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert writers.gguf_name("model.layers.7.mlp.up_proj.weight") == "blk.7.ffn_up.weight"


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_a_folder_saved_by_transformers_opens(tmp_path, spelling):
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=True,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in fields
    if spelling == "rope_scaling":  # as transformers 4 wrote it
        rope = fields.pop("rope_parameters")
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = rope
        (tmp_path / "config.json").write_text(json.dumps(fields))
    opened, tensors = read_all(tmp_path)
    assert opened.architecture.rope_theta == 500000.0
    assert opened.architecture.rope_scaling.model_dump() == scaling
    assert opened.architecture.head_dim == 32
    theirs = model.state_dict()
    assert_same(tensors, {name: theirs[name] for name in opened.architecture.tensor_shapes()})


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_opening_does_not_read_the_weights(tmp_path, form):
    """200 MB on disk; opening and reading one small tensor must not bring them into memory."""
    big = SMALL.model_copy(update={"vocab_size": 400_000})
    tensors = weights() | {"model.embed_tokens.weight": torch.zeros(400_000, 64)}
    if form == "gguf":
        place = write_gguf(tmp_path / "model.gguf", big, kind="F16", tensors=tensors)
    else:
        place = tmp_path / "big"
        write_folder(place, tensors=tensors, dtype=torch.float32)
        config = json.loads((place / "config.json").read_text()) | {"vocab_size": 400_000}
        (place / "config.json").write_text(json.dumps(config))
    del tensors
    before = psutil.Process().memory_info().rss
    opened = checkpoints.load(LLAMA, parse_origin(str(place)))
    opened.read("model.norm.weight")
    assert psutil.Process().memory_info().rss - before < 40e6


def test_what_is_read_is_a_copy(tmp_path):
    opened = checkpoints.load(LLAMA, parse_origin(str(write_folder(tmp_path / "one", dtype=torch.float32))))
    opened.read("model.norm.weight").zero_()
    assert opened.read("model.norm.weight").abs().min() > 0


def test_an_equal_copy_of_the_head_and_rotary_buffers_are_accepted(tmp_path):
    tensors = weights()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    opened = checkpoints.load(LLAMA, parse_origin(str(write_folder(tmp_path / "one", tensors=tensors))))
    assert "lm_head.weight" not in opened.architecture.tensor_shapes()


# ── tokenizers ──────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = (
    "Hello, world!  Two spaces,\ttab\n\nand 2024-01-31, 1234567890.",
    "All human beings are born free and equal in dignity and rights.",
    "Größe, façade, ¿qué?, São Paulo, perché, Straße 12",
    "नमस्ते दुनिया ๑๒๓ สวัสดีชาวโลก 数学 и русский ½ ² ٣",
    "🦙🏽‍🚀 🇹🇭\r\n    def f(x: int) -> int:\r\n\treturn x**2  # don't, I'll, we've",
    " leading", "trailing ", "   ", "\n", "x" * 300,
)  # fmt: skip


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm")
    model = load_named(ModelSpec, "models", "smollm2-135m")
    source = open_source(parse_origin(model.source), model.architecture)
    return tokenizer.write(source, folder, model.architecture.vocab_size), tokenizer.load(folder), source


@pytest.fixture(scope="module")
def documented(smollm):
    """HuggingFaceTB/SmolLM2's own tokenizer.json, composed again: BPE after Digits(individual) and ByteLevel."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    def field(key):
        return smollm[2].metadata._reader.get_field(f"tokenizer.ggml.{key}").contents()

    vocab = {token: i for i, token in enumerate(field("tokens"))}
    own = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in field("merges")]))
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    own.decoder = decoders.ByteLevel()
    return own


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_default_models_tokenizer_is_the_documented_one(smollm, documented, text):
    _, loaded, _ = smollm
    ids = loaded.encode(text)
    assert ids == documented.encode(text).ids
    assert loaded.decode(ids) == text


def test_known_facts_of_the_default_models_tokenizer(smollm):
    ids, loaded, _ = smollm
    assert (ids.bos_id, ids.eos_ids, ids.has_chat_template) == (1, (2,), True)
    assert loaded.tokenize("In 2024 the") == ["In", "Ġ", "2", "0", "2", "4", "Ġthe"]
    assert loaded.encode("<|im_start|>user<|im_end|>") == [1, loaded.convert_tokens_to_ids("user"), 2]
    assert len(loaded) == 49152
    chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert chat.startswith("<|im_start|>system\n")


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_gguf_that_wants_a_first_token_gets_it(tmp_path, add_bos):
    path = write_gguf(tmp_path / "model.gguf", extra={"tokenizer.ggml.add_bos_token": add_bos})
    ids = tokenizer.write(open_source(parse_origin(str(path)), None), tmp_path, 288)
    loaded = tokenizer.load(tmp_path)
    assert (loaded.encode("a")[0] == ids.bos_id) is add_bos
    assert not ids.has_chat_template


def test_tokens_a_user_defined_stay_whole(tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    tokenizer.write(open_source(parse_origin(str(path)), None), tmp_path, 288)
    loaded = tokenizer.load(tmp_path)
    assert loaded.encode("<|user|>") == [len(loaded) - 1]
    assert loaded.decode(loaded.encode("<|user|> he"), skip_special_tokens=True) == "<|user|> he"


def test_a_chat_template_of_a_folder_is_recorded(tmp_path):
    folder = write_folder(tmp_path / "one")
    (tmp_path / "with").mkdir()
    assert tokenizer.write(open_source(parse_origin(str(folder)), None), tmp_path / "with", 288).has_chat_template
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "without").mkdir()
    ids = tokenizer.write(open_source(parse_origin(str(folder)), None), tmp_path / "without", 288)
    assert not ids.has_chat_template


def test_a_weight_file_alone_is_not_a_tokenizer(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match="tokenizer files do not load"):
        tokenizer.load(tmp_path)
