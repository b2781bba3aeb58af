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

from export import first_calls, manifest
from export.checkpoint import Checkpoint
from export.config_json import config_json
from export.manifest import ROOT, Manifest
from export.model import Llama, RMSNorm
from export.quantize import QuantizedModel, eager
from export.schemes import HEAD

from . import logits_file
from .jobs import ReferenceJob, ReferenceTask, report_progress
from .weights import rebuild

Forward = Callable[[torch.Tensor], torch.Tensor]
Kind = Literal["huggingface", "fp32", "quantized", "noise"]
PASS_BYTES = 2**28
"""Most logits of one pass: windows go together as far as they fit, for each pass dequantizes every weight again."""


def compute(job: ReferenceJob) -> dict[str, Any]:
    """Every task in turn, one model in memory at a time."""
    first_calls.settle()
    torch.set_num_threads(job.threads)
    described = manifest.read(Path(job.folder))
    model = rebuild(described, job.source, Path(job.cache))
    for task in job.tasks:
        write_logits(forward_of(task.kind, model, described), task, described.architecture.vocab_size)
    return {"tasks": len(job.tasks)}


def write_logits(forward: Forward, task: ReferenceTask, vocab_size: int) -> None:
    """Write the logits a session would give: after the prefill and after every decoded token."""
    tokens = torch.from_numpy(np.load(task.tokens))
    shape = (tokens.shape[0], tokens.shape[1] - task.prefill, vocab_size)
    together = max(1, PASS_BYTES // (4 * (tokens.shape[1] - 1) * vocab_size))
    with torch.inference_mode(), logits_file.writing(task.out, shape) as write:
        for first in range(0, len(tokens), together):
            logits = forward(tokens[first : first + together, :-1])  # [windows, prefill + decode, V]
            write(logits[:, task.prefill - 1 :].numpy())
            report_progress(min(first + together, len(tokens)), len(tokens))


def forward_of(kind: Kind, model: QuantizedModel, described: Manifest) -> Forward:
    """The reference model as tokens [B, S] → logits [B, S, V]."""
    if kind == "huggingface":
        return hugging_face(model.checkpoint)
    if kind == "fp32":
        llama = eager(model.checkpoint.read, model.checkpoint.architecture, "none")
    else:
        llama = eager(model.read, model.architecture, described.plan.target.activations)
    if kind == "noise":
        add_noise(llama)
    return lambda tokens: llama(tokens)[0]


def add_noise(llama: Llama) -> None:
    """Change every output of a norm or linear by one float32 ulp up or down: another machine's arithmetic, imitated."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: torch.nn.Module, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + 2.0**-23 * torch.randint(-1, 2, out.shape, generator=generator))

    for module in llama.modules():
        if isinstance(module, RMSNorm | torch.nn.Linear):
            module.register_forward_hook(disturb)


def hugging_face(checkpoint: Checkpoint) -> Forward:
    """transformers' own Llama with the checkpoint's weights, built without a config.json."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig.from_dict(config_json(checkpoint.architecture, torch.float32))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: checkpoint.read(name) for name in checkpoint.architecture.tensor_shapes()}
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
    if kind in ("quantized", "noise"):
        inputs |= {"key": described.quantization.key, "activations": described.plan.target.activations}
        inputs["code"] += [digest("export/quantize.py"), digest("export/rounding.py"), version("torchao")]
    if kind == "huggingface":
        inputs["code"] += [digest("export/config_json.py"), version("transformers")]
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return cache / f"reference-{kind}-{key[:16]}.npy"


def digest(name: str) -> str:
    """sha256 of a source file of ours."""
    return hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
