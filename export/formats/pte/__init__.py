"""ExecuTorch `.pte` for XNNPACK, loadable by ExecuTorch's own LLM runners.

`graph.py` is the model in the form that XNNPACK runs best, `program.py` brings it through executorch and writes the
file, and `lowering.py` makes that take seconds.
"""

from math import exp, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from export.architecture import EMBEDDING, Architecture
from export.errors import ExportError
from export.formats import (
    Build,
    Lowered,
    Needs,
    cache_bytes,
    cache_of,
    clients,
    kv_layout,
    refuse_any_scales,
    refuse_plain_attention,
)
from export.manifest import IOContract, KVLayout, Manifest, TensorSpec, TokenizerIds
from export.plan import Cache, Plan

if TYPE_CHECKING:
    from export.quantization.store import QuantizedModel

FILES = ("model.pte",)
TOOLS = ("executorch",)
CACHES: tuple[Cache, ...] = ("float32", "bfloat16", "int8")
NO_CACHES: dict[Cache, str] = {
    "float16": "ExecuTorch's attention has no kernels for it: six times the time of float32",
}
NO_POLICIES: dict[str, str] = {}
LOGGERS = ("executorch",)
_MAX_PREFILL = 512
_SCALE_BYTES = {"int8": 5}
"""Of a head in one slot: a float32 scale and an int8 zero."""
_MAPPED = 65536
"""Bytes of a file that Linux maps where one is read."""
_LIBRARIES_BYTES = 100_000_000
_LAYER_BYTES = 10_000_000
"""Measured memory of executorch and its libraries, and of a layer's graph with every node's values and history."""


def check(plan: Plan, architecture: Architecture) -> None:
    """XNNPACK's rules: whatever breaks one lowers without a warning and then computes garbage or fails to load."""
    from export.quantization import schemes  # its room loads torch

    rule = f"{plan.quant.name} on {plan.target.name}"
    if plan.quant.linear and plan.target.activations != "int8-per-token":
        raise ExportError(
            f"{rule}: XNNPACK computes weight-only linears wrongly (output = reference / scale); "
            "set `activations: int8-per-token` in the target"
        )
    refuse_any_scales(plan, "XNNPACK multiplies by positive bf16 scales only")
    refuse_plain_attention(plan)
    if plan.target.logits != "last":
        raise ExportError(
            f"target {plan.target.name!r}: logits {plan.target.logits!r}, but the program returns those of the last "
            "position only; set `logits: last`"
        )
    for name, scheme in schemes.possible(plan.quant, architecture):
        if name == EMBEDDING:
            if scheme.bits != 8 or scheme.group_size:
                raise ExportError(f"{rule}: {name}: the embedding must be int8 per channel (bits: 8, group_size: null)")
        elif scheme.bits == 8 and scheme.group_size:
            raise ExportError(f"{rule}: {name}: XNNPACK has no int8 groups; use group_size: null")
        elif scheme.group_size and scheme.group_size % 32:
            raise ExportError(f"{rule}: {name}: XNNPACK needs groups of a multiple of 32, not {scheme.group_size}")


def needs(plan: Plan, architecture: Architecture) -> Needs:
    """Memory: all weights, again as XNNPACK's blobs, and the caches, which are buffers of the traced module.

    The integers are pages of the quantized store. A tied table is written twice, as embedding and head, before the
    second copy is removed from the file.
    """
    from export.quantization import schemes  # its room loads torch

    counts, a = schemes.of_recipe(plan.quant, architecture).counts(), architecture
    packed = int(schemes.largest(plan.quant, a).stored_bits(float_bits=32) / 8)
    table = _table_bytes(plan, a) if a.tie_word_embeddings else 0
    caches = cache_bytes(_kv(plan, a))
    weights = counts.store_bytes + counts.scales + 4 * counts.floats  # as many zero points as scales, a byte each
    memory = _LIBRARIES_BYTES + _LAYER_BYTES * a.num_hidden_layers + weights + packed + table + caches
    return Needs(memory, packed + table)


def _table_bytes(plan: Plan, a: Architecture) -> int:
    """Bytes of the embedding table in the file."""
    return a.vocab_size * (a.hidden_size + 4 if plan.quant.embedding else 4 * a.hidden_size)


def tokenizer_notes(folder: Path) -> tuple[str, ...]:
    """ExecuTorch reads tokenizer.json alone."""
    difference = clients.difference("pytorch_tokenizers", folder, Path(__file__).with_name("client.py"))
    return () if difference is None else (f"ExecuTorch's tokenizer {difference}; give its runner ids instead of text",)


def lower(model: "QuantizedModel", build: Build) -> Lowered:
    """Trace, partition, delegate and write `model.pte`."""
    from . import program

    contract = _io_contract(model.architecture, build.plan)
    facts = program.write(model, build, contract)
    return Lowered(contract, facts)


def process_bytes(described: Manifest) -> int | None:
    """Of our C++ runner: program and packed weights, the cache, a piece of a prompt, and the embedding's rows.

    The system maps 64 kB of the table where a token is looked up; the different tokens of a text grow as the root of
    its length. Measured: docs/runner.md.
    """
    a, contract = described.architecture, described.contract
    bits = {layer.name: layer.bits for layer in described.quantization.layers}
    row = a.hidden_size * bits.get(EMBEDDING, 32) / 8
    places = a.vocab_size * row / _MAPPED
    seen = places * (1 - exp(-30 * sqrt(contract.kv.context_length) / places)) if places else 0
    activations = 3 * 4 * contract.max_prefill * a.intermediate_size
    program = 9_000_000 + 250_000 * a.num_hidden_layers + round(1.04 * described.artifact_bytes)
    return program + cache_bytes(contract.kv) + activations + round(seen * _MAPPED)


def methods(
    a: Architecture, contract: IOContract, tokenizer: TokenizerIds
) -> dict[str, int | bool | list[int] | list[float]]:
    """Constant methods that ExecuTorch's runners call (extension/llm/runner/constants.h), with what they return.

    Of a cache with a sink ours takes two more: the tokens that never leave, and how far keys turn per position. Of one
    with a window, too: its tokens, and the slots that they go round in.
    """
    kv = contract.kv
    own: dict[str, int | bool | list[int] | list[float]] = {}
    if kv.window:
        own = {"get_window": kv.window, "get_cache_slots": kv.room}
    if kv.sink:
        own = {"get_sink": kv.sink, "get_rope_frequencies": list(kv.frequencies)}
    return {
        "get_bos_id": tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_ids[0],
        "get_eos_ids": list(tokenizer.eos_ids),
        "get_vocab_size": a.vocab_size,
        "get_n_layers": a.num_hidden_layers,
        "get_max_seq_len": contract.max_prefill,
        "get_max_context_len": contract.kv.context_length,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        **own,
    }


def _io_contract(a: Architecture, plan: Plan) -> IOContract:
    """Inputs are tokens and position, the output is the last logits; the cache belongs to the program."""
    kv = _kv(plan, a)
    return IOContract(
        inputs=(
            TensorSpec(name="tokens", dtype="int64", shape=(1, "sequence")),
            TensorSpec(name="input_pos", dtype="int64", shape=(1,)),
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 1, a.vocab_size)),),
        states=states(kv),
        kv=kv,
        max_prefill=min(_MAX_PREFILL, kv.longest_call),
        logits="last",
    )


def states(kv: KVLayout) -> tuple[TensorSpec, ...]:
    """The cache's buffers as the program names them, in the order in which it writes them.

    That is layer by layer; in a layer tracing turned the order of `cache.attention` round.
    """
    kinds = (
        ("cache", kv.dtype, kv.head_dim),
        *((("zeros", "int8", 1), ("scales", "float32", 1)) if kv.scale_bytes else ()),
    )
    slots = (1, kv.room, kv.kv_heads)
    return tuple(
        TensorSpec(name=f"layers.{i}.{part}_{kind}", dtype=dtype, shape=(*slots, size))
        for i in range(kv.layers)
        for part in ("value", "key")
        for kind, dtype, size in reversed(kinds)
    )


def _kv(plan: Plan, a: Architecture) -> KVLayout:
    return kv_layout(plan, a, "state", scale_bytes=_SCALE_BYTES.get(cache_of(plan), 0))
