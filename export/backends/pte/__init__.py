"""ExecuTorch `.pte` for XNNPACK, loadable by ExecuTorch's own LLM runners. Knows nothing about other formats."""

from collections.abc import Iterator
from pathlib import Path

from ...contract import IOContract, KVLayout, TensorSpec
from ...errors import ExportError
from ...plan import Architecture, Plan
from ...quantize import QuantizedModel
from ...schemes import EMBEDDING, largest, of_recipe, possible
from .. import Build, Lowered, Needs, StoredWeight, refuse_any_scales

MAX_PREFILL = 512
LIBRARIES_BYTES = 100_000_000
LAYER_BYTES = 10_000_000
"""Measured: executorch and its libraries; a layer's graph with every node's values and history."""


def check(plan: Plan, architecture: Architecture) -> None:
    """XNNPACK's rules; each of these lowers without a warning and computes garbage, or fails at load."""
    rule = f"{plan.quant.name} on {plan.target.name}"
    if plan.quant.linear and plan.target.activations != "int8-per-token":
        raise ExportError(
            f"{rule}: XNNPACK computes weight-only linears wrongly (output = reference / scale); "
            "set `activations: int8-per-token` in the target"
        )
    refuse_any_scales(plan, "XNNPACK multiplies by positive bf16 scales only")
    if plan.target.logits != "last":
        raise ExportError(
            f"target {plan.target.name!r}: logits {plan.target.logits!r}, but the program has those of the last "
            "position only; set `logits: last`"
        )
    for name, scheme in possible(plan.quant, architecture):
        if name == EMBEDDING:
            if scheme.bits != 8 or scheme.group_size:
                raise ExportError(f"{rule}: {name}: the embedding must be int8 per channel (bits: 8, group_size: null)")
        elif scheme.bits == 8 and scheme.group_size:
            raise ExportError(f"{rule}: {name}: XNNPACK has no int8 groups; use group_size: null")
        elif scheme.group_size and scheme.group_size % 32:
            raise ExportError(f"{rule}: {name}: XNNPACK needs groups of a multiple of 32, not {scheme.group_size}")


def needs(plan: Plan, architecture: Architecture) -> Needs:
    """Every weight at once, and again as XNNPACK's blobs; the caches, which are buffers of the traced module.

    The integers are the quantized store's own pages. A tied table is head and embedding, one copy too many in the file
    until it is found.
    """
    found, a = of_recipe(plan.quant, architecture).counts(), architecture
    packed = int(largest(plan.quant, a).stored_bits(float_bits=32) / 8)
    table = table_bytes(plan, a) if a.tie_word_embeddings else 0
    caches = 2 * 4 * a.num_hidden_layers * plan.model.context_length * a.num_key_value_heads * a.head_dim
    held = found.store_bytes + found.scales + 4 * found.floats  # zero points are as many as scales, a byte each
    memory = LIBRARIES_BYTES + LAYER_BYTES * a.num_hidden_layers + held + packed + table + caches
    return Needs(memory, packed + table)


def table_bytes(plan: Plan, a: Architecture) -> int:
    """The embedding table as the file holds it."""
    return a.vocab_size * (a.hidden_size + 4 if plan.quant.embedding else 4 * a.hidden_size)


def lower(model: QuantizedModel, build: Build) -> Lowered:
    """Trace, partition, delegate and write `model.pte`."""
    from . import program

    context = build.plan.model.context_length
    contract = io_contract(model.architecture, context, min(MAX_PREFILL, context))
    facts = program.write(model, build, contract)
    return Lowered(contract, facts)


def read_weights(artifact: Path, architecture: Architecture) -> Iterator[StoredWeight]:
    """Every quantized weight in the file, from XNNPACK's own flatbuffers."""
    from . import readback

    yield from readback.read_weights(artifact, architecture)


def io_contract(a: Architecture, context_length: int, max_prefill: int) -> IOContract:
    """Tokens and position in, last logits out; the cache is the program's own."""
    cache = KVLayout(
        kind="state",
        dtype="float32",
        layers=a.num_hidden_layers,
        kv_heads=a.num_key_value_heads,
        head_dim=a.head_dim,
        context_length=context_length,
    )
    return IOContract(
        inputs=(
            TensorSpec(name="tokens", dtype="int64", shape=(1, "sequence")),
            TensorSpec(name="input_pos", dtype="int64", shape=(1,)),
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 1, a.vocab_size)),),
        states=(),
        kv=cache,
        max_prefill=max_prefill,
        logits="last",
    )
