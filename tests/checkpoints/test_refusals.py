"""Hugging Face folders with mistakes: one line that says which file, field or tensor, and what to do."""

import json
import os
import pickle
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from export.checkpoints import open_source, tokenizer
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from tests.support.checkpoints import (
    FILE,
    LLAMA,
    read_everything,
    refusal,
    set_config,
    tokenizer_refusal,
    weights,
    write_folder,
    write_index,
)
from tests.support.harms import MARKER, Execute, entry, put, raw


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "checkpoint")


# ── config.json ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": "int4"}, "quantization_config is 'int4', expected an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "key 'low_freq_factor' is missing"),
        ({"rope_scaling": [1]}, "the RoPE settings are"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": "four", "head_dim": None}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**15}, "model.embed_tokens.weight has shape"),
        ({"hidden_size": None}, "hidden_size"),
        ({"tie_word_embeddings": "perhaps"}, "tie_word_embeddings"),
        ({"max_position_embeddings": 1024}, "max_position_embeddings 1024; ask for at most 1024"),
        ({"max_position_embeddings": 32}, "contexts of less than 64 tokens are not built"),
    ],
)
def test_a_config_our_model_does_not_compute(folder, changes, words):
    set_config(folder, **changes)
    assert words in refusal(LLAMA, folder)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "rms_norm_eps", "max_position_embeddings"],
)  # fmt: skip
def test_a_missing_key_of_config_json_is_named(folder, key):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields[key]
    path.write_text(json.dumps(fields))
    text = refusal(LLAMA, folder)
    assert key in text
    assert "missing" in text


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": ' * 100_000, b"1" * 10_000], ids=lambda content: content[:8]
)
def test_a_config_json_that_is_none(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(LLAMA, folder)


def test_a_folder_without_config_json(folder):
    (folder / "config.json").unlink()
    assert "config.json: missing" in refusal(LLAMA, folder)


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.reliability("pickles that run code", "not opened")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.safetensors"])
def test_a_hostile_pickle_is_never_opened(folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Execute()))
    text = refusal(LLAMA, folder)
    assert "pickled weights are never loaded" in text or "damaged safetensors" in text
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (lambda t: t.update({"model.layers.9.x": torch.zeros(2)}), "not part of the model: model.layers.9.x"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(65)}), "model.norm.weight has shape [65]"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}),
            "is torch.int32",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(64).to(torch.float8_e4m3fn)}), "only float weights"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds NaN or infinity"),
        (lambda t: t["model.embed_tokens.weight"][5].fill_(-float("inf")), "embed_tokens.weight holds NaN or infinity"),
        (lambda t: t.update({"lm_head.weight": torch.ones(288, 64)}), "lm_head.weight differs from"),
        (lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}), "lm_head.weight differs from"),
    ],
)
def test_a_tensor_that_does_not_fit(folder, change, words):
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in weights().items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert words in refusal(LLAMA, folder)


ATTACKS = {
    "seven bytes": put(FILE, bytes(7)),
    "header beyond the file": raw({}, length=1000),
    "header of 2^63": raw({}, length=2**63),
    "not utf-8": raw(b"\xff\xff"),
    "not json": raw(b"{not json}"),
    "a list": raw([1]),
    "overlap": raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "hole": raw({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)),
    "negative offset": raw({"a": entry([2], -8, 0)}, bytes(8)),
    "shape is not the size": raw({"a": entry([3], 0, 8)}, bytes(8)),
    "overflowing shape": raw({"a": entry([2**40, 2**40], 0, 8)}, bytes(8)),
    "unknown dtype": raw({"a": entry([2], 0, 8, "F33")}, bytes(8)),
    "data cut off": raw({"a": entry([4], 0, 16)}, bytes(8)),
    "extra tail": raw({"a": entry([2], 0, 8)}, bytes(9)),
}


@pytest.mark.reliability("safetensors files made malformed by hand", "one line")
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malformed_safetensors_file_is_refused(folder, attack):
    ATTACKS[attack](folder)
    text = refusal(LLAMA, folder)
    assert "model.safetensors: damaged safetensors" in text


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "C64", "BOOL", "U64"])
def test_a_dtype_that_is_no_weight(folder, dtype):
    bits = {"F4": 4, "F6_E2M3": 6, "C64": 64, "U64": 64}.get(dtype, 8)
    raw({"model.norm.weight": entry([64], 0, 64 * bits // 8, dtype)}, bytes(64 * bits // 8))(folder)
    with pytest.raises(ExportError, match=r"model\.norm\.weight"):
        open_source(parse_origin(str(folder)), None).read("model.norm.weight")


# ── shards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def shard_map(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.reliability("shard indexes that lie or lead outside", "one line")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({"model.norm.weight": "model-7.safetensors"}), "model-7.safetensors: missing"),
        (lambda m: m.update({"model.norm.weight": "../model.safetensors"}), "not at a .safetensors file beside it"),
        (lambda m: m.update({"model.norm.weight": "/etc/passwd"}), "not at a .safetensors file beside it"),
        (lambda m: m.update({"model.norm.weight": "pytorch_model.bin"}), "not at a .safetensors file beside it"),
        (lambda m: m.update({"model.norm.weight": ".."}), "not at a .safetensors file beside it"),
        (lambda m: m.update({"model.norm.weight": 3}), "not at a .safetensors file beside it"),
        (lambda m: m.clear(), "tensors are missing"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path, change, words):
    folder = write_folder(tmp_path / "shards", shards=2)
    names = shard_map(folder)
    change(names)
    write_index(folder, names)
    with pytest.raises(ExportError, match=words):
        read_everything(LLAMA, folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none(tmp_path, content):
    folder = write_folder(tmp_path / "shards", shards=2)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(LLAMA, folder)


@pytest.mark.reliability("links in a circle and pipes in a checkpoint", "one line")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_in_a_circle_and_pipes_are_no_files(folder, name):
    """They are neither read without end nor waited for."""
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    assert f"{name}: missing" in refusal(LLAMA, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: a pipe, no file" in refusal(LLAMA, folder)


def test_a_pipe_or_a_folder_is_no_gguf(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    assert "not a checkpoint we read" in refusal(LLAMA, tmp_path / "model.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert "config.json: missing" in refusal(LLAMA, tmp_path / "folder.gguf")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_an_oversized_json_is_not_read(folder, name):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with (folder / name).open("wb") as file:
        file.truncate(2**40)  # a hole, no bytes on the disk
    assert f"{name}: larger than 16777216 bytes" in refusal(LLAMA, folder)


def test_an_index_that_names_itself_or_a_shard_for_everything(tmp_path):
    folder = write_folder(tmp_path / "shards", shards=2)
    names = shard_map(folder)
    write_index(folder, dict.fromkeys(names, "model.safetensors.index.json"))
    assert "not at a .safetensors file beside it" in refusal(LLAMA, folder)
    write_index(folder, dict.fromkeys(names, "model-0.safetensors"))
    assert "model.layers.0.input_layernorm.weight, which model-0.safetensors does not hold" in refusal(LLAMA, folder)
    (folder / "model-1.safetensors").unlink()
    (folder / "model-1.safetensors").symlink_to(folder / "model-1.safetensors")
    write_index(folder, names)
    assert "model-1.safetensors: missing" in refusal(LLAMA, folder)


# ── tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tokenizer_that_is_missing_broken_or_too_large(folder, tmp_path):
    assert "has id 255, but the model's vocab_size is 200" in tokenizer_refusal(folder, tmp_path / "a", vocab_size=200)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "tokenizer.json: not a tokenizer that is read" in tokenizer_refusal(folder, tmp_path / "b")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: missing" in tokenizer_refusal(folder, tmp_path / "c")


def test_a_tokenizer_without_an_end(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    assert "no end-of-sequence token" in tokenizer_refusal(folder, tmp_path / "a")


@pytest.mark.parametrize("ids", ["x", ["2"], [5000], -1, True, {"a": 1}, [[2]], 1.5])
def test_generation_defaults_that_are_no_ids(folder, tmp_path, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    text = tokenizer_refusal(folder, tmp_path / "a")
    assert "generation_config.json" in text or "no end-of-sequence token" in text


@pytest.mark.reliability("code that a tokenizer brings", "not run")
def test_code_that_a_tokenizer_brings_is_never_run(folder, tmp_path):
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(fields))
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).mkdir()\n")
    (tmp_path / "out").mkdir()
    with suppress(ExportError):  # refused, or read as the plain tokenizer it also is
        tokenizer.write(open_source(parse_origin(str(folder)), None), tmp_path / "out", 288)
    assert not (tmp_path / "ran").exists()
