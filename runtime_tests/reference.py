"""What an artifact is judged by: logits of Hugging Face, of our fp32 model and of our quantized model, all eager.

Computed in a child process, a few windows at a time, and kept under a key of everything that decides them.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from export import manifest
from export.checkpoint import Checkpoint
from export.manifest import ROOT, Manifest
from export.quantize import HEAD, eager

from .jobs import ReferenceJob, report_progress
from .weights import rebuild

Forward = Callable[[torch.Tensor], torch.Tensor]
Kind = Literal["huggingface", "fp32", "quantized"]
PASS_BYTES = 2**28
"""Most logits of one pass: windows go together as far as they fit, for each pass dequantizes every weight again."""


def compute(job: ReferenceJob) -> dict[str, Any]:
    """Write the logits a session would give: after the prefill and after every decoded token."""
    torch.set_num_threads(job.threads)
    described = manifest.read(Path(job.folder))
    forward = forward_of(job, described)
    tokens = torch.from_numpy(np.load(job.tokens))
    shape = (tokens.shape[0], tokens.shape[1] - job.prefill, described.architecture.vocab_size)
    out = np.lib.format.open_memmap(job.out, mode="w+", dtype=np.float32, shape=shape)
    together = max(1, PASS_BYTES // (4 * (tokens.shape[1] - 1) * shape[-1]))
    with torch.inference_mode():
        for first in range(0, len(tokens), together):
            logits = forward(tokens[first : first + together, :-1])  # [windows, prefill + decode, V]
            out[first : first + together] = logits[:, job.prefill - 1 :].numpy()
            report_progress(min(first + together, len(tokens)), len(tokens))
    out.flush()
    return {"windows": len(tokens)}


def forward_of(job: ReferenceJob, described: Manifest) -> Forward:
    """The reference model as tokens [B, S] → logits [B, S, V]."""
    model = rebuild(described, job.source, Path(job.cache))
    if job.kind == "huggingface":
        return hugging_face(model.checkpoint)
    if job.kind == "fp32":
        llama = eager(model.checkpoint.read, model.architecture, "none")
    else:
        llama = eager(model.read, model.architecture, described.plan.target.activations)
    return lambda tokens: llama(tokens)[0]


def hugging_face(checkpoint: Checkpoint) -> Forward:
    """transformers' own Llama with the checkpoint's weights, built without a config.json."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    a = checkpoint.architecture
    scaling = {"rope_type": "llama3", **a.rope_scaling.model_dump()} if a.rope_scaling else {"rope_type": "default"}
    fields = a.model_dump(exclude={"rope_theta", "rope_scaling"})
    config = LlamaConfig(**fields, rope_parameters={"rope_theta": a.rope_theta, **scaling})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: checkpoint.read(name) for name in a.tensor_shapes()}
    weights.setdefault(HEAD, weights["model.embed_tokens.weight"])
    model.load_state_dict(weights, strict=True, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is no weight, so meta left it empty
    model.eval()
    return lambda tokens: model(tokens, use_cache=False).logits


def locate(kind: Kind, described: Manifest, tokens: NDArray[np.int64], cache: Path) -> Path:
    """Where the logits are, or will be: named by the hash of everything that decides them."""
    inputs: dict[str, Any] = {
        "kind": kind,
        "weights": [described.checkpoint.origin, described.checkpoint.sha256],
        "architecture": described.architecture.model_dump(),
        "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "shape": tokens.shape,
        "code": [digest("export/model.py"), digest("runtime_tests/reference.py"), version("torch")],
    }
    if kind == "quantized":
        inputs |= {"key": described.quantization.key, "activations": described.plan.target.activations}
        inputs["code"] += [digest("export/quantize.py"), version("torchao")]
    if kind == "huggingface":
        inputs["code"].append(version("transformers"))
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return cache / f"reference-{kind}-{key[:16]}.npy"


def digest(name: str) -> str:
    """sha256 of a source file of ours."""
    return hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
