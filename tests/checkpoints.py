"""Very small checkpoints in every form the project reads, to be opened or broken by tests."""

import base64
import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from export import checkpoint, tokenizer
from export.config_json import config_json
from export.errors import ExportError
from export.plan import Architecture, ModelSpec, load_named
from export.sources import open_source
from export.sources.seeded import SeededSource
from runtime_tests.bench.checkpoints import meta_name, meta_params
from runtime_tests.bench.row_order import in_meta_order

LLAMA = load_named(ModelSpec, "models", "llama")
SMALL = Architecture(
    vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rope_theta=10000.0, rope_scaling=None, rms_norm_eps=1e-5,
    tie_word_embeddings=True, max_position_embeddings=2048,
)  # fmt: skip
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip

BNB_CONFIG = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
    "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
}  # fmt: skip


def weights(architecture=SMALL):
    """Seeded float32 tensors, exact in bfloat16 and float16."""
    source = SeededSource("3", architecture)
    return {name: source.read(name).to(torch.bfloat16).half().float() for name in source.shapes}


def write_folder(folder, architecture=SMALL, *, dtype=torch.bfloat16, shards=1, tensors=None):
    """A Hugging Face folder with tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(architecture, dtype)))
    SeededSource("3", architecture).write_tokenizer(folder)
    tensors = {name: t.to(dtype) for name, t in (tensors or weights(architecture)).items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = {i: sorted(tensors)[i::shards] for i in range(shards)}
    for i, part in names.items():
        save_file({name: tensors[name] for name in part}, folder / f"model-{i}.safetensors", {"format": "pt"})
    weight_map = {name: f"model-{i}.safetensors" for i, part in names.items() for name in part}
    write_index(folder, weight_map)
    return folder


def write_bnb(folder, architecture=SMALL, *, kind="nf4", nested=True, storage=torch.uint8, keep=(), blocksize=64):
    """A folder whose linears bitsandbytes has quantized, but those whose names hold one of `keep`, in bfloat16."""
    from bitsandbytes.functional import quantize_4bit

    tensors = {}
    for name, weight in weights(architecture).items():
        tensors[name] = weight.bfloat16()
        if name.endswith("_proj.weight") and not any(part in name for part in keep):
            tensors[name], state = quantize_4bit(
                tensors[name], blocksize=blocksize, compress_statistics=nested, quant_type=kind, quant_storage=storage
            )
            tensors |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    write_folder(folder, architecture)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, quantization_config=BNB_CONFIG | {
        "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": list(keep),
        "bnb_4bit_quant_storage": str(storage).removeprefix("torch."),
    })  # fmt: skip
    return folder


def write_jlama(folder, architecture=SMALL, *, kind="Q4", rows_of_one=True):
    """A folder as Jlama's `quantize` writes it: everything but norms in blocks of 32, scales of either sign."""
    write_folder(folder, architecture)
    parts = {}
    for name, weight in weights(architecture).items():
        if weight.ndim == 1:
            parts[name] = ("F32", weight[None] if rows_of_one else weight, weight.numpy().tobytes())
        else:
            data, scales = jlama_block(weight, kind)
            parts[name] = (kind, weight, data)
            parts[f"{name}.qb"] = ("F32", scales, scales.numpy().tobytes())
    header, at = {}, 0
    for name, (dtype, like, data) in parts.items():
        header[name] = {"dtype": dtype, "shape": list(like.shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    write_raw(folder / "model.safetensors", header, b"".join(data for _, _, data in parts.values()))
    return folder


def jlama_block(weight, kind):
    """[N, K] → bytes and scales [N, K/32], by `processBlock` of Q4ByteBufferTensor.java and Q8ByteBufferTensor.java."""
    blocks = weight.view(len(weight), -1, 32)
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    if kind == "I8":
        scales = largest.abs() / 127
        return (blocks / scales).round().to(torch.int8).numpy().tobytes(), scales[..., 0].contiguous()
    scales = largest / -8
    codes = torch.clamp((blocks / scales + 8.5).to(torch.uint8), max=15)
    return (codes[..., :16] | codes[..., 16:] << 4).numpy().tobytes(), scales[..., 0].contiguous()


def write_raw(path, header, data=b"", length=None):
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


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
    write_folder(folder, architecture)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, quantization_config=fields)
    return folder


META_SMALL = SMALL.model_copy(update={"vocab_size": 512, "max_position_embeddings": 8192})


def write_meta(folder):
    """META_SMALL as Meta saves a model; its tokenizer knows the bytes and Llama 3's special tokens."""
    tensors = {meta_name(n): in_meta_order(n, w, META_SMALL).bfloat16() for n, w in weights(META_SMALL).items()}
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(META_SMALL)))
    ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (folder / "tokenizer.model").write_text(ranks)
    return folder


def set_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def gguf_name(name):
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
    return GGUF_NAMES[name]


def interleaved(weight, heads):
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, architecture=SMALL, *, kind="F32", tensors=None, leave_out=(), extra=None, floats=()):
    """A GGUF as llama.cpp's converter writes it: `kind` for matrices, F32 for norms and `floats`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (metadata(architecture) | (extra or {})).items():
        if key not in leave_out:
            add(writer, key, value)
    a = architecture
    for name, tensor in (tensors or weights(a)).items():
        values = tensor.numpy()
        if name.endswith("q_proj.weight"):
            values = interleaved(values, a.num_attention_heads)
        if name.endswith("k_proj.weight"):
            values = interleaved(values, a.num_key_value_heads)
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 and name not in floats else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(values), stored)
        writer.add_tensor(gguf_name(name) if not name.startswith("!") else name[1:], data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(a):
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "he", "Ġthe", "<s>", "</s>", "<|user|>"]
    return {
        "llama.context_length": a.max_position_embeddings,
        "llama.embedding_length": a.hidden_size,
        "llama.block_count": a.num_hidden_layers,
        "llama.feed_forward_length": a.intermediate_size,
        "llama.attention.head_count": a.num_attention_heads,
        "llama.attention.head_count_kv": a.num_key_value_heads,
        "llama.rope.freq_base": a.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": a.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": ["Ġ a", "h e", "Ġt he", "Ġ t"][:2],
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }


def add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, value)


def refusal(model, place):
    """The one line that opening and reading a whole checkpoint ends in."""
    with pytest.raises(ExportError) as caught:
        read_everything(model, place)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 800
    return text


def read_everything(model, place):
    opened = checkpoint.load(model, str(place))
    return {name: opened.read(name) for name in opened.architecture.tensor_shapes()}


def tokenizer_refusal(folder, out, vocab_size=288):
    out.mkdir()
    with pytest.raises(ExportError) as caught:
        tokenizer.write(open_source(str(folder), None), out, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)
