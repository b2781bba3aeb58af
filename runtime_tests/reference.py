"""References: logits of Hugging Face's model, our fp32 model and our quantized model, all in eager PyTorch.

They are computed in a child process, a few windows at a time, and cached under a hash of all inputs and code.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from export import manifest
from export.architecture import EMBEDDING, HEAD
from export.checkpoints import Checkpoint
from export.checkpoints.folder import config_json
from export.host import digests, mkl
from export.manifest import Manifest
from export.model import Llama, RMSNorm, without
from export.quantization.eager import eager
from export.quantization.store import QuantizedModel

from .checks.weights import rebuild
from .jobs import ReferenceJob, ReferenceTask, logits_file, report_progress
from .sessions.base import leaving

_Forward = Callable[..., torch.Tensor]
Kind = Literal["huggingface", "fp32", "quantized", "noise"]
_PIECE = 512
_PASS_BYTES = 2**28
"""Limit of one pass's logits. As many windows as fit share a pass, since each pass dequantizes every weight again."""


def compute(job: ReferenceJob) -> dict[str, Any]:
    """Write the logits of every task, with one model in memory at a time. Raises SourceError."""
    mkl.settle()
    torch.set_num_threads(job.threads)
    described = manifest.read(Path(job.folder))
    model = rebuild(described, job.source, Path(job.cache))
    windows = [len(np.load(task.tokens, mmap_mode="r")) for task in job.tasks]
    for i, task in enumerate(job.tasks):
        done = sum(windows[:i])
        for more in _write_logits(_forward_of(task.kind, model, described), task, described.architecture.vocab_size):
            report_progress(done + more, sum(windows))
    return {"tasks": len(job.tasks)}


def _write_logits(forward: _Forward, task: ReferenceTask, vocab_size: int) -> Iterator[int]:
    """The logits that a session gives: after the prefill and after every decoded token. Yields how many windows are."""
    tokens = torch.from_numpy(np.load(task.tokens))
    shape = (tokens.shape[0], tokens.shape[1] - task.prefill, vocab_size)
    batch = max(1, _PASS_BYTES // (4 * (tokens.shape[1] - 1) * vocab_size))
    with torch.inference_mode(), logits_file.writing(task.out, shape) as write:
        for first in range(0, len(tokens), batch):
            write(forward(tokens[first : first + batch, :-1], task.prefill - 1).numpy())
            yield min(first + batch, len(tokens))


def _forward_of(kind: Kind, model: QuantizedModel, described: Manifest) -> _Forward:
    """The reference model as tokens [B, S], first → logits [B, S - first, V] from position `first` on."""
    if kind == "huggingface":
        return hugging_face(model.checkpoint, described.plan.window)
    llama, sink = _eager_of(kind, model, described), described.plan.sink
    context = described.contract.kv.context_length
    return partial(_from, llama) if sink is None else partial(_endless, llama, context, sink)


def _eager_of(kind: Kind, model: QuantizedModel, described: Manifest) -> Llama:
    window = described.plan.window
    if kind == "fp32":
        llama = eager(model.checkpoint.read, model.checkpoint.architecture, "none", window)
    else:
        llama = eager(model.read, model.architecture, described.plan.target.activations, window)
    if kind == "noise":
        _add_noise(llama)
    return llama


def read(
    kind: Kind, described: Manifest, source: str | None, cache: Path, tokens: Sequence[int], after: Sequence[int]
) -> NDArray[np.float32]:
    """Logits [R, V] of a reference in our PyTorch after some places of one text, 0 the first. Raises SourceError."""
    llama, rows, kv = _eager_of(kind, rebuild(described, source, cache), described), [], None
    with torch.inference_mode():
        for start in range(0, len(tokens), _PIECE):
            piece = range(start, min(start + _PIECE, len(tokens)))
            logits, kv = llama(torch.tensor([tokens[piece.start : piece.stop]]), kv)
            rows.append(logits[0, [place - start for place in after if place in piece]].numpy())
    return np.concatenate(rows)


def _from(llama: Llama, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Logits from a position on; a long text before it is fed in pieces, whose logits memory need not hold."""
    cache = None
    begin = max(0, first - _PIECE)
    for piece in torch.split(tokens[:, :begin], _PIECE, 1) if begin else ():
        _, cache = llama(piece, cache)
    logits: torch.Tensor = llama(tokens[:, begin:], cache)[0]
    return logits[:, first - begin :]


def _endless(llama: Llama, context: int, sink: int, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """The same where older tokens leave a full context, as in `Session.make_room`."""
    cache, fed, rows = None, 0, []
    while fed < tokens.shape[1]:
        held = cache[0][0].shape[2] if cache else 0
        if cache and held == context:
            cache, held = (
                without(cache, llama.architecture, sink, leaving(context, sink)),
                held - leaving(context, sink),
            )
        piece = tokens[:, fed : fed + min(_PIECE, context - held)]
        logits, cache = llama(piece, cache)
        rows.append(logits[:, max(0, first - fed) :])
        fed += piece.shape[1]
    return torch.cat(rows, 1)


def _add_noise(llama: Llama) -> None:
    """Move outputs of norms and linears by up to one float32 ulp, which imitates the arithmetic of another machine."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: torch.nn.Module, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + 2.0**-23 * torch.randint(-1, 2, out.shape, generator=generator))

    for module in llama.modules():
        if isinstance(module, RMSNorm | torch.nn.Linear):
            module.register_forward_hook(disturb)


def hugging_face(checkpoint: Checkpoint, window: int | None = None) -> _Forward:
    """transformers' own Llama with the checkpoint's weights, built without a config.json."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig.from_dict(config_json(checkpoint.architecture, torch.float32))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: checkpoint.read(name) for name in checkpoint.architecture.tensor_shapes()}
    weights.setdefault(HEAD, weights[EMBEDDING])
    model.load_state_dict(weights, strict=True, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is not a weight, so it is still on meta
    model.eval()

    def forward(tokens: torch.Tensor, first: int = 0) -> torch.Tensor:
        visible = None if window is None else torch.ones(2 * tokens.shape[1:], dtype=torch.bool).tril().triu(1 - window)
        mask = None if visible is None else visible.expand(len(tokens), 1, -1, -1)
        logits: torch.Tensor = model(tokens, attention_mask=mask, use_cache=False).logits[:, first:]
        return logits

    return forward


def locate(kind: Kind, described: Manifest, tokens: NDArray[np.int64], cache: Path) -> Path:
    """The path of a reference's logits in the cache, named by the hash of everything that decides them."""
    inputs: dict[str, Any] = {
        "kind": kind,
        "weights": [described.checkpoint.origin, described.checkpoint.sha256],
        "architecture": described.architecture.model_dump(),
        "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "shape": tokens.shape,
        "code": [digests.room_digest("checkpoints", "quantization", "model.py"), digests.code_digest(Path(__file__))],
        "torch": version("torch"),
    } | ({"policy": [policy, described.contract.kv.context_length]} if (policy := described.plan.policy) else {})
    if kind in ("quantized", "noise"):
        inputs |= {"key": described.quantization.key, "activations": described.plan.target.activations}
        inputs["torchao"] = version("torchao")
    if kind == "huggingface":
        inputs["transformers"] = version("transformers")
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return cache / f"reference-{kind}-{key[:16]}.npy"
