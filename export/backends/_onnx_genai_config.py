"""genai_config.json: how onnxruntime-genai finds the graph's inputs, outputs and special tokens. Knows no weights."""

from typing import Any

from ..contract import IOContract, TokenizerIds
from ..plan import Architecture

FILE = "genai_config.json"


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
    """All physical cores unless the device says otherwise, by threads that sleep between operators.

    Without intra_op_num_threads, onnxruntime-genai takes half of the logical cores as if each had two threads (one
    thread on a two-core machine); 0 leaves the choice to onnxruntime. Threads that spin take the cores from whatever
    else runs: on two busy cores a token took 39 ms with spinning and 28 ms without, a prompt of 64 tokens 478 and 251.
    """
    return {
        "log_id": "onnxruntime-genai",
        "intra_op_num_threads": 0,
        "session.intra_op.allow_spinning": "0",  # unknown names go to onnxruntime as they are
        "provider_options": [],
    }
