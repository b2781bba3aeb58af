"""One checkpoint in the forms that stock tools read: a Hugging Face folder, Meta's file and params.json, a GGUF.

Knows nothing about quantization, exporters or timing.

    python -m runtime_tests.bench.checkpoints huggingface OUT MANIFEST [SOURCE]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from export import checkpoint, manifest, tokenizer
from export.checkpoint import Checkpoint
from export.config_json import config_json
from export.errors import ExportError
from export.manifest import Manifest
from export.plan import Architecture

from ..jobs import SourceDiffersError
from . import gguf_form
from .row_order import in_meta_order

META_LAYER = {
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
META_TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
META_ORIGINAL_LENGTH = 8192
"""ExecuTorch's `apply_scaling` has Llama 3's own constants built in: this length and a low frequency factor of 1."""


def write_hugging_face(source: Checkpoint, folder: Path) -> None:
    """config.json, model.safetensors and the tokenizer; the numbers are the checkpoint's own, bit for bit."""
    from safetensors.torch import save_file

    a, dtype = source.architecture, exact_dtype(source)
    save_file(read_all(source, dtype), folder / "model.safetensors", {"format": "pt"})
    ids = tokenizer.write(source.source, folder, a.vocab_size)
    config = config_json(a, dtype) | {"bos_token_id": ids.bos_id, "eos_token_id": list(ids.eos_ids)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_meta(source: Checkpoint, folder: Path) -> None:
    """consolidated.00.pth and params.json, as `export_llm` takes them."""
    a = source.architecture
    params = meta_params(a)
    weights = {meta_name(name): in_meta_order(name, w, a) for name, w in read_all(source, exact_dtype(source)).items()}
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def read_all(source: Checkpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the model; a tied head is not among them."""
    return {name: source.read(name).to(dtype) for name in source.architecture.tensor_shapes()}


def exact_dtype(source: Checkpoint) -> torch.dtype:
    """bfloat16 if it holds every weight exactly, else float32; one tensor in memory at a time."""
    tensors = (source.read(name) for name in source.architecture.tensor_shapes())
    return torch.bfloat16 if all(torch.equal(w.bfloat16().float(), w) for w in tensors) else torch.float32


def meta_params(a: Architecture) -> dict[str, Any]:
    """params.json of Meta's releases; `hidden_dim` replaces the two numbers it is otherwise derived from."""
    scaling = a.rope_scaling
    if scaling and (scaling.original_max_position_embeddings, scaling.low_freq_factor) != (META_ORIGINAL_LENGTH, 1.0):
        raise ExportError(
            f"rope_scaling {scaling.model_dump()}: export_llm computes only original_max_position_embeddings "
            f"{META_ORIGINAL_LENGTH} and low_freq_factor 1"
        )
    params = {
        "dim": a.hidden_size,
        "n_layers": a.num_hidden_layers,
        "n_heads": a.num_attention_heads,
        "n_kv_heads": a.num_key_value_heads,
        "head_dim": a.head_dim,
        "hidden_dim": a.intermediate_size,
        "vocab_size": a.vocab_size,
        "norm_eps": a.rms_norm_eps,
        "rope_theta": a.rope_theta,
        "use_scaled_rope": scaling is not None,
    }
    if scaling:
        params |= {"rope_scale_factor": int(scaling.factor), "high_freq_factor": int(scaling.high_freq_factor)}
    return params


def meta_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `layers.3.attention.wq.weight`."""
    if name in META_TOP:
        return META_TOP[name]
    _, layers, index, *module, leaf = name.split(".")
    return f"{layers}.{index}.{META_LAYER['.'.join(module)]}.{leaf}"


def opened(described: Manifest, source: str | None) -> Checkpoint:
    """The checkpoint an artifact was built from, or an error that it is another one now."""
    found = checkpoint.load(described.plan.model, source or described.checkpoint.origin)
    if found.sha256 != described.checkpoint.sha256:
        raise SourceDiffersError(f"{found.origin}: not the checkpoint that {described.id} was built from (sha256)")
    return found


def write_gguf(source: Checkpoint, folder: Path) -> None:
    """model.gguf, which llama.cpp quantizes; the numbers are the checkpoint's own, bit for bit."""
    gguf_form.write(source, folder, exact_dtype(source))


FORMS = {"huggingface": write_hugging_face, "meta": write_meta, "gguf": write_gguf}


def main(form: str, out: str, manifest_path: str, source: str | None = None) -> None:
    """Write one form into an existing folder."""
    FORMS[form](opened(manifest.read(Path(manifest_path).parent), source), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
