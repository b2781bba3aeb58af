"""Names, YAML files and Hugging Face folders with mistakes: one line that says which file or field, and what to do."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from export import checkpoint, manifest, plan, tokenizer
from export.errors import ExportError
from export.plan import load_plan
from export.sources import open_source

from .checkpoints import LLAMA, SMALL, read_everything, refusal, tokenizer_refusal, weights, write_folder, write_index


def command(*arguments, cwd=manifest.ROOT, **environment):
    """The real command; gives exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "export", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(manifest.ROOT), **environment}, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "checkpoint")


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("tiny", "int4-g32"), 2, "Missing argument"),
        (("tiny", "int4-g32", "coreml", "--bits", "3"), 2, "No such option"),
        (("llama", "int4-g32", "onnx-cpu"), 1, "give --source"),
        (("llama", "int4-g32", "onnx-cpu", "--source", "nobody/nothing"), 1, "--source"),
    ],
)
def test_the_command_ends_in_one_line_and_leaves_nothing(tmp_path, arguments, code, words):
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    returned, lines = command(*arguments, cwd=tmp_path, **unreachable)
    errors = [line for line in lines if line.startswith("error:")]
    assert (returned, len(errors)) == (code, 1)
    assert words in errors[0]
    left = [path.name for path in tmp_path.glob("build/*") if not path.name.endswith(".lock")]
    assert left == []


def test_a_hub_that_cannot_be_reached_or_must_not_be(monkeypatch, tmp_path):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert "give a local folder with --source" in refusal(LLAMA, "hub:nobody/nothing@main")
    assert "give a local folder with --source" in refusal(LLAMA, "hub:a bad name")


# ── names and YAML ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (("tiny2", "int4-g32", "coreml"), "smollm2-135m"),
        (("tiny", "../quant/int4-g32", "coreml"), "int4-g128"),
        (("tiny", "int4-g32", "tflite"), "executorch-xnnpack"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(names, known):
    with pytest.raises(ExportError, match=rf"unknown name .* known: .*{known}"):
        load_plan(*names)


@pytest.fixture
def configs(tmp_path, monkeypatch):
    copied = shutil.copytree(plan.CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("evals"))
    monkeypatch.setattr(plan, "CONFIGS", copied)
    return copied


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("models/tiny", {"contxt": 1}, "contxt: unknown key"),
        ("models/tiny", {"license": None}, "license: Input should be a valid string"),
        ("models/tiny", {"context_length": "many"}, "context_length: Input should be a valid integer"),
        ("models/tiny", {"context_length": 8}, "context_length: .*greater than or equal to 64"),
        ("models/tiny", {"context_length": 4096}, "context_length 4096 is more than .*2048"),
        ("models/tiny", {"name": "other"}, "remove the key `name`"),
        ("models/tiny", {"architecture": {"vocab_size": 512}}, r"architecture\.hidden_size: missing"),
        ("models/tiny", {"source": "seed:x"}, "seed must be a whole number"),
        ("models/tiny", {"source": "package:nobody/x"}, "package 'nobody' is not installed"),
        ("models/tiny", {"source": "package:numpy/x"}, "reinstall the package 'numpy'"),
        ("quant/int4-g32", {"linear": {"bits": 3, "group_size": 32}}, r"linear\.bits: Input should be 4 or 8"),
        ("quant/int4-g32", {"linear": {"bits": 4, "group_size": 0}}, r"linear\.group_size: .*greater than 0"),
        ("quant/int4-g32", {"linear": {"bits": 4, "group_size": 48}}, r"layers\.0\.self_attn\.q_proj.*groups of 48"),
        ("quant/int4-g32", {"head": None}, "embedding and head are tied"),
        ("quant/int4-g32", {"method": "none"}, "method 'none' contradicts"),
        ("quant/int4-g32", {"method": "gguf"}, "method: Input should be"),
        ("targets/coreml", {"backend": "tflite"}, "unknown backend 'tflite'.*onnx_kv"),
        ("targets/coreml", {"backend": "_mil_llama"}, "unknown backend"),
        ("targets/coreml", {"artifact": "../../model.mlpackage"}, "artifact: String should match"),
        ("targets/coreml", {"activations": "int4"}, "activations: Input should be 'none' or"),
    ],
)
def test_a_wrong_value_in_a_yaml_names_its_field(configs, tmp_path, file, changes, words):
    from export.pipeline import export

    path = configs / f"{file}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    with pytest.raises(ExportError, match=words):
        export(load_plan("tiny", "int4-g32", "coreml"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not readable as YAML"), ("- a", "found list"), ("", "found NoneType"), ("\xff", "found str"),
        ("a: !!python/object/apply:os.system [true]", "not readable as YAML"),
    ],
)  # fmt: skip
def test_a_yaml_that_is_none(configs, text, words):
    path = configs / "quant" / "int4-g32.yaml"
    path.write_text(text)
    with pytest.raises(ExportError, match=rf"int4-g32\.yaml.*{words}"):
        load_plan("tiny", "int4-g32", "coreml")


def test_a_missing_key_in_a_yaml(configs):
    path = configs / "quant" / "int4-g32.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("limits")))
    with pytest.raises(ExportError, match="limits: missing"):
        load_plan("tiny", "int4-g32", "coreml")


def test_a_group_that_does_not_divide_is_named_before_the_checkpoint_is_opened(monkeypatch, tmp_path):
    from export.pipeline import export

    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("opened"))
    with pytest.raises(
        ExportError, match=r"layers\.0\.self_attn\.q_proj\.weight has 576 input features.*groups of 128"
    ):
        export(load_plan("smollm2-135m", "int4-g128", "onnx-cpu"), None, tmp_path / "out")


def test_a_group_that_does_not_divide_is_named_before_the_weights_are_hashed(monkeypatch, tmp_path, folder):
    from export.pipeline import export

    monkeypatch.setattr(checkpoint, "sha256", lambda path: pytest.fail("hashed"))
    with pytest.raises(ExportError, match="64 input features, which groups of 128"):
        export(load_plan("llama", "int4-g128", "onnx-cpu"), str(folder), tmp_path / "out")


# ── places ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("./nowhere", "no such file or folder"),
        ("", "--source is empty"),
        ("~nobody-here/x", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("package:..", "is not installed"),
        ("package:", "is not installed"),
        (__file__, "not a checkpoint we read"),
        ("seed:1", "needs an architecture"),
    ],
)
def test_a_source_that_is_none(place, words):
    assert words in refusal(LLAMA, place)


def test_another_size_of_model_names_the_fields(tmp_path):
    wide = write_folder(tmp_path / "wide", SMALL.model_copy(update={"hidden_size": 96, "head_dim": 24}))
    small = LLAMA.model_copy(update={"name": "small", "architecture": SMALL})
    text = refusal(small, wide)
    assert "not the shapes of small: hidden_size 96 (expected 64), head_dim 24 (expected 16)" in text


# ── config.json ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "already quantized"),
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
        ({"max_position_embeddings": 1024}, "context_length 2048 is more than"),
    ],
)
def test_a_config_our_model_does_not_compute(folder, changes, words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
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


class Payload:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.safetensors"])
def test_a_hostile_pickle_is_never_opened(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    text = refusal(LLAMA, folder)
    assert "pickled weights are never loaded" in text or "damaged safetensors" in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (lambda t: t.update({"model.layers.9.x": torch.zeros(2)}), "not part of the model: model.layers.9.x"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(65)}), "model.norm.weight has shape [65]"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}),
            "model.norm.weight is torch.int",
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


def raw(header, body=b"", length=None):
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ATTACKS = {
    "empty": b"",
    "seven bytes": bytes(7),
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


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malformed_safetensors_file_is_refused(folder, attack):
    (folder / "model.safetensors").write_bytes(ATTACKS[attack])
    text = refusal(LLAMA, folder)
    assert "model.safetensors: damaged safetensors" in text


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "C64", "BOOL", "U64"])
def test_a_dtype_that_is_no_weight(folder, dtype):
    bits = {"F4": 4, "F6_E2M3": 6, "C64": 64, "U64": 64}.get(dtype, 8)
    header = {"model.norm.weight": entry([64], 0, 64 * bits // 8, dtype)}
    (folder / "model.safetensors").write_bytes(raw(header, bytes(64 * bits // 8)))
    with pytest.raises(ExportError, match=r"model\.norm\.weight"):
        open_source(str(folder), None).read("model.norm.weight")


# ── shards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def shard_map(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({"model.norm.weight": "model-7.safetensors"}), "model-7.safetensors: missing"),
        (lambda m: m.update({"model.extra": "model-0.safetensors"}), "differ from .*: model.extra"),
        (lambda m: m.pop("model.norm.weight"), "differ from .*: model.norm.weight"),
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


def test_a_shard_that_lost_a_tensor(tmp_path):
    folder = write_folder(tmp_path / "shards", shards=2)
    tensors = load_file(folder / "model-1.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "model-1.safetensors")
    assert "model-1.safetensors: its tensors differ" in refusal(LLAMA, folder)


# ── tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tokenizer_that_is_missing_broken_or_too_large(folder, tmp_path):
    assert "261 tokens, the model's vocab_size is 200" in tokenizer_refusal(folder, tmp_path / "a", vocab_size=200)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "tokenizer files do not load" in tokenizer_refusal(folder, tmp_path / "b")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: missing" in tokenizer_refusal(folder, tmp_path / "c")


def test_a_tokenizer_without_an_end(folder, tmp_path):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    assert "no end-of-sequence token" in tokenizer_refusal(folder, tmp_path / "a")


@pytest.mark.parametrize("ids", [[], "x", ["2"], [5000], -1, True, {"a": 1}, [[2]], 1.5])
def test_generation_defaults_that_are_no_ids(folder, tmp_path, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    text = tokenizer_refusal(folder, tmp_path / "a")
    assert "generation_config.json" in text or "no end-of-sequence token" in text


def test_code_that_a_tokenizer_brings_is_never_run(folder, tmp_path):
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(fields))
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).mkdir()\n")
    (tmp_path / "out").mkdir()
    try:
        tokenizer.write(open_source(str(folder), None), tmp_path / "out", 288)
    except ExportError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()
