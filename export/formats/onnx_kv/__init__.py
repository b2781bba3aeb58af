"""ONNX for onnxruntime on CPUs: model.onnx, model.onnx.data, and genai_config.json for onnxruntime-genai.

A target chooses whether a prompt yields the logits of its last position, which generation needs, or of every position,
for clients that score prompts.
"""

import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.architecture import EMBEDDING, HEAD, Architecture
from export.errors import ExportError
from export.formats import Build, Lowered, Needs, cache_bytes, cache_of, clients, kv_layout, refuse_plain_attention
from export.manifest import IOContract, KVLayout, LayerInfo, Manifest, TensorSpec, TokenizerIds
from export.plan import Cache, Plan, WeightScheme

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from export.quantization.store import QuantizedModel

TOOLS = ("onnx", "onnxruntime", "onnxruntime-genai")
CACHES: tuple[Cache, ...] = ("float32", "int8")
NO_CACHES: dict[Cache, str] = {
    "float16": "onnxruntime would convert the whole cache to float32 at every step (0.54 times the speed at 1,900 "
    "tokens)",
    "bfloat16": "GroupQueryAttention has no kernel for it on CPUs",
}
NO_POLICIES: dict[str, str] = {}
LOGGERS = ()
FILE = "model.onnx"
GENAI_CONFIG = "genai_config.json"
FILES = (FILE, f"{FILE}.data", GENAI_CONFIG)
_SPIN_US = 100
"""How long threads wait actively, µs; the gaps between two operators are shorter. On two quiet cores, threads that
sleep at once make a decode step of SmolLM2-135M 10 % longer; beside another busy process, threads that spin without a
limit make it 55 % longer."""
_CHUNK = 128
"""Tokens of a prompt that onnxruntime-genai feeds at a time. It holds logits of all of them: a prompt of 1,900 tokens
takes 8.7 s of CPU time and 326 MB in pieces, 12.0 s and 423 MB at once (SmolLM2-135M)."""
_CALL = 256
"""Tokens of a prompt that our session feeds at a time."""
_BLOCK_SIZES = (256, 128, 64, 32, 16)
"""Block sizes of MatMulNBits and GatherBlockQuantized."""
_BLOCKS_PER_CHANNEL = 16
"""Minimum for a row of a per-channel scheme. onnxruntime rounds activations to int8 per block, so an outlier
degrades as many channels as its block has: KL of the head alone on SmolLM2-135M (rows of 576) is 0.0010 with blocks of
32, 0.0020 with 64, 0.0048 with 192. Time hardly depends on it: a head of 128,256 × 2,048 takes 22.4 ms with blocks of
128 and 256, 23.0 with 64, 24.8 with 32."""


def check(plan: Plan, architecture: Architecture) -> None:
    """Refuse what MatMulNBits, GatherBlockQuantized or GroupQueryAttention cannot hold."""
    from export.quantization import schemes  # its room loads torch

    if plan.target.activations != "none":
        raise ExportError(
            f"target {plan.target.name!r}: activations is {plan.target.activations!r}, but onnxruntime rounds "
            "activations itself inside MatMulNBits; set it to none"
        )
    refuse_plain_attention(plan)
    if architecture.head_dim % 16:
        raise ExportError(
            f"head_dim {architecture.head_dim}: GroupQueryAttention rotates heads of a multiple of 16 only; "
            "use the target executorch-xnnpack"
        )
    for name, scheme in schemes.possible(plan.quant, architecture):
        _check_block(plan, name, scheme, architecture.tensor_shapes()[name][-1])


def _check_block(plan: Plan, name: str, scheme: WeightScheme, columns: int) -> None:
    """Refuse a weight whose scales cannot be laid out in blocks that onnxruntime supports."""
    if block_size(scheme, columns):
        return
    sizes = ", ".join(str(size) for size in reversed(_BLOCK_SIZES))
    rule = f"recipe {plan.quant.name!r} on {plan.target.name!r}"
    if scheme.group_size:
        raise ExportError(
            f"{rule}: {name} has groups of {scheme.group_size}, MatMulNBits takes {sizes}; "
            "use one of those as group_size"
        )
    raise ExportError(
        f"{rule}: {name} is per channel with {columns} input features, which no block size of "
        f"MatMulNBits ({sizes}) divides; leave it in float (null)"
    )


def block_size(scheme: WeightScheme, columns: int) -> int:
    """Columns that share a scale in the file; 0 if no block size of onnxruntime fits."""
    if scheme.group_size:
        return scheme.group_size if scheme.group_size in _BLOCK_SIZES else 0
    fitting = [size for size in _BLOCK_SIZES if columns % size == 0]
    return next((size for size in fitting if size * _BLOCKS_PER_CHANNEL <= columns), min(fitting, default=0))


def needs(plan: Plan, architecture: Architecture) -> Needs:
    """One tensor at a time, read and packed; for an int8 cache a layer and what text gives in it."""
    from export.quantization import schemes  # its room loads torch

    counts = schemes.of_recipe(plan.quant, architecture).counts()
    libraries = 40_000_000  # onnx, and the graph without its weights
    memory = libraries + counts.largest * (2 if counts.integers else 8)
    if cache_of(plan) == "int8":
        from . import scales

        memory = max(memory, libraries + scales.memory_bytes(architecture))
    return Needs(memory, int(schemes.largest(plan.quant, architecture).stored_bits(float_bits=32) / 8))


def tokenizer_notes(folder: Path) -> tuple[str, ...]:
    """onnxruntime-genai takes parts of tokenizer.json only: of SmolLM2's splitting, it leaves out the digits."""
    difference = clients.difference("onnxruntime_genai", folder, Path(__file__).with_name("client.py"))
    return () if difference is None else (f"onnxruntime-genai {difference}; feed it ids where text has such parts",)


def lower(model: "QuantizedModel", build: Build) -> Lowered:
    """Stream the weights to model.onnx.data, then write the graph and the configuration of onnxruntime-genai."""
    from . import graph
    from .weights import DataFile

    contract = _contract_of(model.architecture, build.plan)
    scales: tuple[NDArray[np.float32], ...] = ()
    measured_on = None
    if contract.kv.dtype == "int8":
        from .scales import calibrated

        scales, measured_on = calibrated(model, build)
    with (build.folder / f"{FILE}.data").open("wb") as file:
        proto = graph.build(model, DataFile(file, f"{FILE}.data"), contract, scales)
    (build.folder / FILE).write_bytes(proto.SerializeToString(deterministic=True))
    config = genai_config(model.architecture, contract, build.tokenizer)
    (build.folder / GENAI_CONFIG).write_text(config, encoding="utf-8")
    return Lowered(contract, graph.facts(proto, model.architecture), measured_on)


def _contract_of(architecture: Architecture, plan: Plan) -> IOContract:
    """Inputs and outputs named as by onnxruntime-genai's own builder."""
    a, kv = architecture, kv_layout(plan, architecture, "io")
    past, present = (
        tuple(
            TensorSpec(
                name=f"{prefix}.{i}.{kind}",
                dtype=kv.dtype,
                shape=(1, a.num_key_value_heads, length, a.head_dim),
            )
            for i in range(a.num_hidden_layers)
            for kind in ("key", "value")
        )
        for prefix, length in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length"))
    )
    ids = TensorSpec(name="input_ids", dtype="int64", shape=(1, "sequence_length"))
    mask = TensorSpec(name="attention_mask", dtype="int64", shape=(1, "total_sequence_length"))
    positions: str | int = "sequence_length" if plan.target.logits == "all" else 1
    logits = TensorSpec(name="logits", dtype="float32", shape=(1, positions, a.vocab_size))
    return IOContract(
        inputs=(ids, mask, *past),
        outputs=(logits, *present),
        states=(),
        kv=kv,
        max_prefill=kv.context_length,
        logits=plan.target.logits,
    )


def process_bytes(described: Manifest) -> int | None:
    """Of our session: Python with onnxruntime, the table, weights as it packs them, the cache, a call's activations.

    Weights are packed with a float32 scale and sum for each block, and the scale stays as a constant too. Loading
    leaves up to 16 MB in the allocator. Measured: docs/runner.md.
    """
    a, contract = described.architecture, described.contract
    layers = {layer.name: layer for layer in described.quantization.layers}
    if a.tie_word_embeddings and EMBEDDING in layers:
        layers[HEAD] = layers[EMBEDDING]
    shapes = {EMBEDDING: (a.vocab_size, a.hidden_size), **a.all_linear_shapes()}
    if any(name not in layers or layers[name].levels != "even" for name in shapes):
        return None  # of floats and other levels not all is packed, and some is computed as a whole
    table = prod(shapes.pop(EMBEDDING)) * layers[EMBEDDING].bits / 8
    packed = sum(_packed_bytes(layers[name], *shape) for name, shape in shapes.items())
    call = 4 * min(_CALL, contract.kv.context_length) * a.intermediate_size
    left = min(16_000_000, 20 * a.hidden_size * a.intermediate_size)
    return round(60_000_000 + table + packed + cache_bytes(contract.kv) + 10 * call + left)


def _packed_bytes(layer: LayerInfo, rows: int, columns: int) -> float:
    group_size = None if layer.group_size == columns else layer.group_size
    blocks = columns / block_size(WeightScheme(bits=layer.bits, group_size=group_size), columns)
    return rows * (columns * layer.bits / 8 + 12 * blocks)


def genai_config(architecture: Architecture, contract: IOContract, tokenizer: TokenizerIds) -> str:
    """The text of genai_config.json."""
    return json.dumps(_genai_config(architecture, contract, tokenizer, FILE), indent=1) + "\n"


def _genai_config(architecture: Architecture, contract: IOContract, tokenizer: TokenizerIds, filename: str) -> Any:
    """The whole file: greedy search by default, the cache allocated once and written in place."""
    context = contract.kv.context_length
    return {
        "model": {
            "type": "llama",
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": list(tokenizer.eos_ids),
            "pad_token_id": tokenizer.eos_ids[0] if tokenizer.pad_id is None else tokenizer.pad_id,
            "vocab_size": architecture.vocab_size,
            "context_length": context,
            "decoder": _decoder(architecture, filename) | _sliding_window(contract.kv),
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "min_length": 0,
            "max_length": context,
            "chunk_size": _CHUNK,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "early_stopping": True,
            "past_present_share_buffer": True,
        },
    }


def _decoder(architecture: Architecture, filename: str) -> Any:
    """Shapes, file and tensor names."""
    return {
        "session_options": _session_options(),
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


def _sliding_window(kv: KVLayout) -> Any:
    """How the client sizes its buffers, where the graph reuses slots."""
    if kv.window is None or kv.slots is None:
        return {}
    sizes = {"window_size": kv.window, "cache_slack": kv.slots - kv.window}
    unslid = {"slide_key_value_cache": False, "slide_inputs": False}  # GroupQueryAttention moves what is in the cache
    return {"sliding_window": sizes | unslid | {"layers": list(range(kv.layers))}}


def _session_options() -> Any:
    """As many threads as onnxruntime chooses (0), which wait actively for _SPIN_US and then sleep.

    Without intra_op_num_threads, onnxruntime-genai takes half of the logical cores, as if each core had two threads:
    one thread on a two-core machine.
    """
    return {
        "log_id": "onnxruntime-genai",
        "intra_op_num_threads": 0,
        "session.intra_op.allow_spinning": "1",  # names that onnxruntime-genai does not know are passed to onnxruntime
        "session.intra_op.spin_duration_us": str(_SPIN_US),
        "provider_options": [],
    }
