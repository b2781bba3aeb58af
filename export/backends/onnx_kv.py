"""ONNX for onnxruntime on CPUs: model.onnx, model.onnx.data, genai_config.json. Chooses no integers.

onnxruntime-genai runs the folder as it is. A target chooses whether a prompt yields the logits of its last position,
which is what generation needs, or of every one, for clients that score prompts.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from ..contract import IOContract, KVLayout, TensorSpec
from ..errors import ExportError
from ..plan import Architecture, Levels, Plan, WeightScheme
from ..quantize import QuantizedModel
from ..schemes import EMBEDDING, largest, of_recipe, possible
from . import Build, Lowered, Needs, StoredWeight
from . import _onnx_genai_config as genai
from ._onnx_activations import FLOAT_ACTIVATIONS
from ._onnx_graph import build as build_graph
from ._onnx_weights import BLOCK_SIZES, BNB4_TYPES, Codes, DataFile, StoredTensors, block_size, split

FILE = "model.onnx"
LEVELS_OF = {number: levels for levels, number in BNB4_TYPES.items()}
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Our names of the weights whose rows are stored as one matrix."""


def check(plan: Plan, architecture: Architecture) -> None:
    """Refuse what MatMulNBits, GatherBlockQuantized or GroupQueryAttention cannot hold."""
    if plan.target.activations != "none":
        raise ExportError(
            f"target {plan.target.name!r}: activations is {plan.target.activations!r}, but onnxruntime rounds "
            "activations itself inside MatMulNBits; set it to none"
        )
    if architecture.head_dim % 16:
        raise ExportError(
            f"head_dim {architecture.head_dim}: GroupQueryAttention rotates heads of a multiple of 16 only; "
            "use the target executorch-xnnpack"
        )
    for name, scheme in possible(plan.quant, architecture):
        check_block(plan, name, scheme, architecture.tensor_shapes()[name][-1])


def check_block(plan: Plan, name: str, scheme: WeightScheme, columns: int) -> None:
    """Refuse a weight whose scales cannot be laid out in blocks that onnxruntime takes."""
    if block_size(scheme, columns):
        return
    sizes = ", ".join(str(size) for size in reversed(BLOCK_SIZES))
    if scheme.group_size:
        raise ExportError(
            f"recipe {plan.quant.name!r}: {name} has groups of {scheme.group_size}, MatMulNBits takes {sizes}; "
            "use one of those as group_size"
        )
    raise ExportError(
        f"recipe {plan.quant.name!r}: {name} is per channel with {columns} input features, which no block size of "
        f"MatMulNBits ({sizes}) divides; leave it in float (null)"
    )


def needs(plan: Plan, architecture: Architecture) -> Needs:
    """One tensor at a time, read and packed."""
    found = of_recipe(plan.quant, architecture).counts()
    libraries = 40_000_000  # onnx, and the graph without its weights
    memory = libraries + found.largest * (2 if found.integers else 8)
    return Needs(memory, int(largest(plan.quant, architecture).stored_bits(float_bits=32) / 8))


def lower(model: QuantizedModel, build: Build) -> Lowered:
    """Stream the weights to model.onnx.data, then write the graph and onnxruntime-genai's configuration."""
    contract = contract_of(model.architecture, build.plan)
    with (build.folder / f"{FILE}.data").open("wb") as file:
        proto = build_graph(model, DataFile(file, f"{FILE}.data"), contract)
    (build.folder / FILE).write_bytes(proto.SerializeToString(deterministic=True))
    config = genai.genai_config(model.architecture, contract, build.tokenizer, FILE)
    (build.folder / genai.FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return Lowered(contract, facts(proto, model.architecture))


def contract_of(architecture: Architecture, plan: Plan) -> IOContract:
    """Inputs and outputs as onnxruntime-genai's own builder names them."""
    a, layers, context_length = architecture, range(architecture.num_hidden_layers), plan.model.context_length
    kinds = [(i, kind) for i in layers for kind in ("key", "value")]
    past, present = (
        tuple(
            TensorSpec(
                name=f"{prefix}.{i}.{kind}",
                dtype="float32",
                shape=("batch_size", a.num_key_value_heads, length, a.head_dim),
            )
            for i, kind in kinds
        )
        for prefix, length in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length"))
    )
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length"))
    mask = TensorSpec(name="attention_mask", dtype="int64", shape=("batch_size", "total_sequence_length"))
    positions: str | int = "sequence_length" if plan.target.logits == "all" else 1
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch_size", positions, a.vocab_size))
    return IOContract(
        inputs=(ids, mask, *past),
        outputs=(logits, *present),
        states=(),
        kv=KVLayout(
            kind="io",
            dtype="float32",
            layers=a.num_hidden_layers,
            kv_heads=a.num_key_value_heads,
            head_dim=a.head_dim,
            context_length=context_length,
        ),
        max_prefill=context_length,
        logits=plan.target.logits,
    )


def facts(proto: Any, architecture: Architecture) -> dict[str, int | float | str]:
    """Node counts, and the bytes that one copy of a tied embedding saves."""
    counts = Counter(node.op_type for node in proto.graph.node)
    levels = Counter(entry.i for node in proto.graph.node for entry in node.attribute if entry.name == "accuracy_level")
    shared = 0
    if architecture.tie_word_embeddings:
        table = (tensor for tensor in proto.graph.initializer if tensor.name.startswith(EMBEDDING))
        stored = (tensor for tensor in table if onnx.external_data_helper.uses_external_data(tensor))
        shared = sum(onnx.external_data_helper.ExternalDataInfo(tensor).length for tensor in stored)
    return {
        "nodes": sum(counts.values()),
        "matmul_nbits_nodes": counts["MatMulNBits"],
        "matmul_bnb4_nodes": counts["MatMulBnb4"],
        "float_activation_nodes": levels[FLOAT_ACTIVATIONS],
        "float_matmul_nodes": counts["FusedMatMul"],
        "group_query_attention_nodes": counts["GroupQueryAttention"],
        "shared_embedding_bytes": shared,
    }


def read_weights(artifact: Path, architecture: Architecture) -> Iterator[StoredWeight]:
    """Integers and scales out of model.onnx (or its folder) by memory map; onnxruntime is not asked."""
    path = artifact / FILE if artifact.is_dir() else artifact
    graph = onnx.load(path, load_external_data=False).graph
    tensors = StoredTensors(graph.initializer, path.parent)
    makers = {output: node for node in graph.node for output in node.output}
    seen = set()
    for node in graph.node:
        codes = codes_of(node, tensors, makers)
        if codes and codes.q not in seen:
            seen.add(codes.q)
            yield from split(*tensors.weight(codes), rows_of(codes, architecture))


def codes_of(node: Any, tensors: StoredTensors, makers: Mapping[str, Any]) -> Codes | None:
    """The quantized matrix a node multiplies with or gathers from."""
    attributes = {entry.name: entry.i for entry in node.attribute}
    levels: Levels = "even"
    if node.op_type in {"MatMulNBits", "MatMulBnb4"}:
        q, scale, rows, columns = node.input[1], node.input[2], attributes["N"], attributes["K"]
    elif node.op_type == "GatherBlockQuantized":
        q, scale = node.input[0], node.input[2]
        rows, blocks, _ = tensors.tensors[q].dims
        columns = blocks * attributes["block_size"]
    else:
        return None
    if node.op_type == "MatMulBnb4":
        levels = LEVELS_OF[attributes["quant_type"]]
    stored = stored_scale(scale, makers)
    per_channel = tensors.tensors[stored].dims[1] == 1
    bits, block = attributes.get("bits", 4), attributes["block_size"]
    return Codes(q, stored, rows, columns, bits, block, per_channel, levels)


def stored_scale(name: str, makers: Mapping[str, Any]) -> str:
    """The initializer a node's scales are made of."""
    while name in makers:
        maker = makers[name]
        if maker.op_type not in {"Cast", "Expand", "Reshape"}:
            raise ExportError(f"{name}: scales are computed by {maker.op_type}; build the artifact again")
        name = maker.input[0]
    return name


def rows_of(codes: Codes, architecture: Architecture) -> dict[str, int]:
    """Our names of the stacked weights in one stored matrix, and their rows."""
    name = codes.q.removesuffix(".q")
    kinds = next((kinds for stacked, kinds in STACKED.items() if name.endswith(f".{stacked}.weight")), None)
    if kinds is None:
        return {name: codes.rows}
    shapes = architecture.linear_shapes()
    parts = [f"{name.rsplit('.', 2)[0]}.{kind}.weight" for kind in kinds]
    return {part: shapes[part][0] for part in parts}
