"""Very small checkpoints in every form the project reads, to be opened or broken by tests."""

import base64
import json
from dataclasses import dataclass, replace

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from export import checkpoints
from export.checkpoints import open_source, tokenizer
from export.checkpoints.origin import parse_origin
from export.checkpoints.seed import SeededSource
from export.errors import ExportError
from export.plan import Architecture, ModelSpec, load_named
from export.toolbox import writers

LLAMA = load_named(ModelSpec, "models", "llama")
SMALL = Architecture(
    vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rope_theta=10000.0, rope_scaling=None, rms_norm_eps=1e-5,
    tie_word_embeddings=True, max_position_embeddings=2048,
)  # fmt: skip
LAYER = "model.layers.0."
UP = f"{LAYER}mlp.up_proj"
FILE, INDEX, GGUF, PTH = "model.safetensors", "model.safetensors.index.json", "model.gguf", "consolidated.00.pth"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ADAPTER, ADAPTER_FILE, ADAPTER_CONFIG = "adapter", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"


@dataclass
class Small:
    """Given tensors, or seeded ones in float32, exact in bfloat16 and float16."""

    architecture: Architecture = SMALL
    tensors: dict[str, torch.Tensor] | None = None

    def read(self, name):
        if self.tensors is not None:
            return self.tensors[name]
        return SeededSource("3", self.architecture).read(name).bfloat16().half().float()


def weights(architecture=SMALL):
    return writers.read_all(Small(architecture), torch.float32)


# ── Hugging Face folders ────────────────────────────────────────────────────────────────────────────────────────────


def write_rest(folder, architecture=SMALL, dtype=torch.bfloat16, **fields):
    """A Hugging Face folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    writers.write_config(folder, architecture, dtype, fields)
    SeededSource("3", architecture).write_tokenizer(folder)


def write_folder(folder, architecture=SMALL, *, dtype=torch.bfloat16, shards=1, tensors=None):
    """A Hugging Face folder with tokenizer."""
    write_rest(folder, architecture, dtype)
    tensors = {name: t.to(dtype) for name, t in (tensors or weights(architecture)).items()}
    if shards == 1:
        writers.write_safetensors(tensors, folder)
        return folder
    write_shards(folder, tensors, shards)
    return folder


def write_shards(folder, tensors, count):
    """Tensors dealt out over files, and their index. Returns the files' names."""
    weight_map = {name: f"model-{i % count}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in weight_map if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return set(weight_map.values())


def set_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path, header, data=b"", length=None):
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


BNB_CONFIG = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
    "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
}  # fmt: skip


def write_bnb(folder, architecture=SMALL, *, kind="nf4", nested=True, storage=torch.uint8, keep=(), blocksize=64):
    """A folder whose linears bitsandbytes has quantized, but those whose names hold one of `keep`, in bfloat16."""
    options = {"quant_type": kind, "compress_statistics": nested, "quant_storage": storage, "blocksize": blocksize}
    write_rest(folder, architecture, quantization_config=BNB_CONFIG | {
        "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": list(keep),
        "bnb_4bit_quant_storage": str(storage).removeprefix("torch."),
    })  # fmt: skip
    writers.write_safetensors(writers.bnb_tensors(Small(architecture), skipped=keep, **options), folder)
    return folder


def write_jlama(folder, architecture=SMALL, *, kind="Q4"):
    """A folder as Jlama's `quantize` writes it: everything but norms in blocks of 32, scales of either sign."""
    write_rest(folder, architecture)
    writers.write_jlama(Small(architecture), folder, kind)
    return folder


def packed(values, bits):
    """AutoGPTQ's `pack`: rows of small integers [R, C] → int32 [R, C·bits/32], lowest bits first."""
    places = torch.arange(0, 32, bits)
    words = (values.long().view(len(values), -1, len(places)) << places).sum(-1)
    return (words - ((words >> 31) << 32)).int()


def gptq_tensors(name, codes, zeros, scales, groups, *, bits=4, version=1):
    """A linear as GPTQModel stores it: codes [N, K], zeros and scales [N, groups], groups [K].

    Version 1 has ones taken from the packed zero points, whole words at a time (`convert_gptq_v2_to_v1_format`).
    """
    linear = name.removesuffix(".weight")
    ones = sum(1 << place for place in range(0, 32, bits)) if version == 1 else 0
    return {
        f"{linear}.qweight": packed(codes, bits).t().contiguous(),
        f"{linear}.qzeros": packed(zeros.t(), bits) - ones,
        f"{linear}.scales": scales.t().contiguous(),
        f"{linear}.g_idx": groups.int(),
    }


GPTQ_CONFIG = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
    "checkpoint_format": "gptq", "pack_dtype": "int32", "damp_percent": 0.05, "true_sequential": True,
}  # fmt: skip


def write_gptq(folder, linears, *, architecture=SMALL, version=1, **config):
    """A folder with the given linears in GPTQ's format: name → codes, zeros, scales, groups; the rest in float16."""
    fields = GPTQ_CONFIG | {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"} | config
    tensors = {name: weight.half() for name, weight in weights(architecture).items() if name not in linears}
    for name, parts in linears.items():
        tensors |= gptq_tensors(name, *parts, bits=fields["bits"], version=version)
    write_rest(folder, architecture, quantization_config=fields)
    writers.write_safetensors(tensors, folder)
    return folder


def write_lora(folder):
    """A folder with an adapter, by hand, of rank 4 for two linears in a folder of its own."""
    write_folder(folder)
    (folder / ADAPTER).mkdir()
    shapes, tensors = SMALL.linear_shapes(), {}
    for module in ("self_attn.q_proj", "mlp.up_proj"):
        rows, columns = shapes[f"{LAYER}{module}.weight"]
        generator = torch.Generator().manual_seed(1)
        tensors[lora(module, "A")] = torch.randn(4, columns, generator=generator)
        tensors[lora(module, "B")] = torch.randn(rows, 4, generator=generator)
    save_file(tensors, folder / ADAPTER_FILE)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields))
    return folder


def lora(module, which):
    return f"base_model.model.{LAYER}{module}.lora_{which}.weight"


def write_gptq_folder(folder):
    """Every linear in GPTQ's format, symmetric."""
    linears = {}
    for name, (rows, columns) in SMALL.linear_shapes().items():
        generator = torch.Generator().manual_seed(len(name))
        codes = torch.randint(0, 16, (rows, columns), generator=generator)
        zeros, scales = torch.full((rows, columns // 32), 8), torch.full((rows, columns // 32), 0.01).half()
        linears[name] = (codes, zeros, scales, torch.arange(columns) // 32)
    return write_gptq(folder, linears)


def write_torchao(folder):
    """One linear as torchao's integers, by hand."""
    write_rest(folder, quantization_config={"quant_method": "torchao"})
    tensors = {name: weight.bfloat16() for name, weight in weights().items() if name != f"{UP}.weight"}
    rows, columns = SMALL.linear_shapes()[f"{UP}.weight"]
    tensors |= {
        f"{UP}._weight_qdata": torch.ones(rows, columns, dtype=torch.int8),
        f"{UP}._weight_scale": torch.full((rows, columns // 32), 0.01),
        f"{UP}._weight_zero_point": torch.zeros(rows, columns // 32, dtype=torch.int8),
    }
    save_file(tensors, folder / FILE, {f"{UP}.weight": json.dumps(TORCHAO)})
    return folder


TORCHAO = {
    "_type": "IntxUnpackedToInt8Tensor",
    "_data": {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "block_size": [1, 32]},
    "_tensor_data_names": ["qdata", "scale", "zero_point"],
}


# ── Meta's folder and GGUF ──────────────────────────────────────────────────────────────────────────────────────────

META_SMALL = SMALL.model_copy(update={"vocab_size": 512, "max_position_embeddings": 8192})


def write_meta(folder):
    """META_SMALL as Meta saves a model; its tokenizer knows the bytes and Llama 3's special tokens."""
    writers.write_meta(Small(META_SMALL), folder, torch.bfloat16)
    ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (folder / "tokenizer.model").write_text(ranks)
    return folder


def write_gguf(path, architecture=SMALL, *, kind="F32", tensors=None, more=None, leave_out=(), extra=None, floats=()):
    """A GGUF as llama.cpp's converter writes it: `kind` for matrices, F32 for norms and `floats`.

    `more` tensors have GGUF's names.
    """
    fields = {key: value for key, value in (metadata(architecture) | (extra or {})).items() if key not in leave_out}
    stored = writers.gguf_tensors(Small(architecture, tensors), GGMLQuantizationType[kind])
    for name in floats:
        stored[writers.gguf_name(name)] = replace(stored[writers.gguf_name(name)], kind=GGMLQuantizationType.F32)
    for name, tensor in (more or {}).items():
        stored[name] = writers.GgufTensor(GGMLQuantizationType.F32, tuple(tensor.shape), tensor.clone)
    writers.write_gguf(path, fields, stored)
    return path


OPTIONAL = ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size")
"""Keys that older converters leave out."""


def metadata(architecture):
    """With a tokenizer of bytes and six more tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "he", "Ġthe", "<s>", "</s>", "<|user|>"]
    shapes = writers.gguf_metadata(architecture)
    return {key: value for key, value in shapes.items() if key.removeprefix("llama.") not in OPTIONAL} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": ["Ġ a", "h e", "Ġt he", "Ġ t"][:2],
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }


# ── every form, and how one is refused ──────────────────────────────────────────────────────────────────────────────


def in_folder(write):
    """A form that is one file."""

    def run(folder):
        folder.mkdir(parents=True)
        write(folder)

    return run


FORMS = {
    "safetensors": write_folder,
    "shards": lambda folder: write_folder(folder, shards=2),
    "gguf": in_folder(lambda folder: write_gguf(folder / GGUF)),
    "gguf q8": in_folder(lambda folder: write_gguf(folder / GGUF, kind="Q8_0")),
    "jq4": write_jlama,
    "bitsandbytes": write_bnb,
    "gptq": write_gptq_folder,
    "torchao": write_torchao,
    "meta": in_folder(write_meta),
    "lora": write_lora,
}


def arguments(form, folder):
    """The command's options for a checkpoint of a form."""
    place = folder / GGUF if form.startswith("gguf") else folder
    return ["--source", str(place), *(["--adapter", str(folder / ADAPTER)] if form == "lora" else [])]


def refusal(model, place):
    """The one line that opening and reading a whole checkpoint ends in."""
    with pytest.raises(ExportError) as caught:
        read_everything(model, place)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 800
    return text


def read_everything(model, place):
    opened = checkpoints.load(model, parse_origin(str(place)))
    return {name: opened.read(name) for name in opened.architecture.tensor_shapes()}


def tokenizer_refusal(folder, out, vocab_size=288):
    out.mkdir()
    with pytest.raises(ExportError) as caught:
        tokenizer.write(open_source(parse_origin(str(folder)), None), out, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)
