"""The PyTorch model that an artifact is compared with: torchao's tensors compute with the integers."""

from collections.abc import Callable, Iterator

import torch

from export.architecture import EMBEDDING, HEAD, Architecture
from export.checkpoints.integers import Integers, values_of
from export.model import Llama

from .nearest import INT_TYPES

_ReadWeight = Callable[[str], torch.Tensor | Integers]
_INT8_ACTIVATIONS = "int8_asym_per_token"


def eager(weight_of: _ReadWeight, architecture: Architecture, activations: str, window: int | None = None) -> Llama:
    """The model of these weights; `activations` as in the target YAML (int8 per token: linears only)."""
    return Llama(architecture, window).load(dict(eager_weights(weight_of, architecture, activations)))


def eager_weights(
    weight_of: _ReadWeight, architecture: Architecture, activations: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Named weights for `Llama.load`, linears with the activation quantization that the runtime adds."""
    names = list(architecture.tensor_shapes())
    for name in names if HEAD in names else [*names, HEAD]:
        weight = weight_of(EMBEDDING if name == HEAD and architecture.tie_word_embeddings else name)
        if isinstance(weight, Integers):
            int8_inputs = activations == "int8-per-token" and name != EMBEDDING
            weight = as_torchao(weight, _INT8_ACTIVATIONS if int8_inputs else None)
        yield name, weight


def as_torchao(weight: Integers, activations: str | None = None) -> torch.Tensor:
    """The torchao tensor that computes with these integers; for levels that torchao lacks, their float32 values."""
    if weight.levels != "even":
        return values_of(weight.qdata, weight.levels) * weight.scale.repeat_interleave(weight.group_size, 1)
    from torchao.quantization import IntxUnpackedToInt8Tensor  # see nearest.py

    tensor: torch.Tensor = IntxUnpackedToInt8Tensor(
        qdata=weight.qdata,
        scale=weight.scale,
        zero_point=torch.zeros_like(weight.scale, dtype=torch.int8),
        target_dtype=INT_TYPES[weight.bits],
        block_size=(1, weight.group_size),
        dtype=torch.float32,
        activation_quantization=activations,
    )
    return tensor
