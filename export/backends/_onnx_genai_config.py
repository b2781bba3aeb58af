"""genai_config.json: how onnxruntime-genai finds the graph's inputs, outputs and special tokens. Knows no weights."""

from typing import Any

from ..contract import IOContract, TokenizerIds
from ..plan import Architecture

FILE = "genai_config.json"
SPIN_US = 100
"""The gaps between two operators are shorter. On two quiet cores, threads that sleep at once make a decode step of
SmolLM2-135M 10 % longer; beside another busy process, threads that spin as long as they like make it 55 % longer."""


def genai_config(architecture: Architecture, contract: IOContract, tokenizer: TokenizerIds, filename: str) -> Any:
    """The whole file; greedy search by default, the cache allocated once and written in place."""
    context = contract.kv.context_length
    return {
        "model": {
            "type": "llama",
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": list(tokenizer.eos_ids),
            "pad_token_id": tokenizer.eos_ids[0],
            "vocab_size": architecture.vocab_size,
            "context_length": context,
            "decoder": decoder(architecture, filename),
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "min_length": 0,
            "max_length": context,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "early_stopping": True,
            "past_present_share_buffer": True,
        },
    }


def decoder(architecture: Architecture, filename: str) -> Any:
    """Shapes, file and tensor names."""
    return {
        "session_options": session_options(),
        "filename": filename,
        "head_size": architecture.head_dim,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_hidden_layers": architecture.num_hidden_layers,
        "num_key_value_heads": architecture.num_key_value_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def session_options() -> Any:
    """All physical cores unless the device says otherwise, by threads that wait actively for SPIN_US and then sleep.

    Without intra_op_num_threads, onnxruntime-genai takes half of the logical cores as if each had two threads (one
    thread on a two-core machine); 0 leaves the choice to onnxruntime.
    """
    return {
        "log_id": "onnxruntime-genai",
        "intra_op_num_threads": 0,
        "session.intra_op.allow_spinning": "1",  # unknown names go to onnxruntime as they are
        "session.intra_op.spin_duration_us": str(SPIN_US),
        "provider_options": [],
    }
