"""config.json of a Hugging Face folder, written for the architecture that we compute. Knows no weights."""

from typing import Any

import torch

from .plan import Architecture


def config_json(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The keys that transformers 4 and 5 and the onnxruntime-genai builder all read."""
    scaling = architecture.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **architecture.model_dump(exclude={"rope_scaling"}),
        "rope_scaling": {"rope_type": "llama3", **scaling.model_dump()} if scaling else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
