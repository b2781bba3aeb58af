"""The decoder as an ONNX graph with its cache as past/present tensors.

Shapes: B batch, which is 1, S new tokens, P cache slots passed in, T tokens so far, H query heads, G key/value heads,
D head_dim.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper

from export.architecture import EMBEDDING, FINAL_NORM, HEAD, ROTATE_IN, ROTATE_OUT, Architecture
from export.manifest import IOContract, TensorSpec
from export.model import rope_tables
from export.plan import WeightScheme
from export.quantization.store import QuantizedModel

from .vocabulary import INT8_CACHE, OPERATORS, window
from .weights import BNB4_TYPES, Codes, DataFile

MATMULS = {"FusedMatMul", "MatMulBnb4", "MatMulNBits"}
"""Operators that `_multiply` and `_multiply_float` write: every product with a stored weight."""
_UNPADDED = "attention_mask_must_not_have_padding"
"""The node that a padded batch fails in: runtimes name it in their error."""
_OPSETS = (("", 21), ("com.microsoft", 1))
_IR_VERSION = 10
_FLOAT_ACTIVATIONS, _INT8_ACTIVATIONS = 1, 4
"""MatMulNBits accuracy_level: its fast kernels of 4-bit weights."""
_ELEMENT_TYPES = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "int8": TensorProto.INT8}


class Graph:
    """Nodes in the order they are added; initializers go straight to the data file."""

    def __init__(self, model: QuantizedModel, data: DataFile) -> None:
        self.model = model
        self.architecture: Architecture = model.architecture
        self.data = data
        self.nodes: list[Any] = []
        self.embedding: Codes | str | None = None
        """The table that a tied head multiplies with: codes, or the name of the float matrix."""
        self.scales: dict[str, str] = {}
        """Stored scales → float32 scales of every block."""
        self.last_index = ""
        """Initializer [-1]."""
        self.attention: tuple[str, ...] = ()
        """Inputs that all GroupQueryAttention nodes share: sequence lengths and RoPE tables."""
        self.cache_scales: Sequence[NDArray[np.float32]] = ()
        """Of an int8 cache, key and value scales of each layer in turn; empty: the cache is float32."""
        self.window: Mapping[str, int] = {}
        """Attributes of every attention node, where tokens do not attend to all before them."""

    def node(
        self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], attributes: Mapping[str, Any] | None = None
    ) -> str:
        """Add a node, named by its first output. Returns that name."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        made = helper.make_node(op, inputs, names, names[0], domain=OPERATORS[op], **(attributes or {}))
        self.nodes.append(made)
        return names[0]

    def constant(self, name: str, values: Sequence[int]) -> str:
        """A small int64 initializer inside model.onnx, where shape inference can see it."""
        array = np.array(values, np.int64)
        self.data.tensors.append(helper.make_tensor(name, TensorProto.INT64, array.shape, array))
        return name

    def float_weight(self, name: str) -> str:
        """A tensor of the checkpoint as float32, under its own name."""
        return self.data.add(name, self.model.weights.read(name).numpy())

    def scheme(self, name: str) -> WeightScheme | None:
        return self.model.schemes.of(name)

    def add_codes(self, stored: str, names: Sequence[str], scheme: WeightScheme) -> Codes:
        """Quantized weights stacked along their rows, stored as `stored`."""
        weights = [codes for codes in map(self.model.codes, names) if codes]
        return self.data.add_codes(stored, weights, scheme, common_scales=self.model.recipe.common_scales)


def build(
    model: QuantizedModel, data: DataFile, contract: IOContract, cache_scales: Sequence[NDArray[np.float32]] = ()
) -> Any:
    """The ModelProto; weights are appended to `data` in execution order. `cache_scales`: of an int8 cache."""
    graph = Graph(model, data)
    graph.cache_scales = cache_scales
    graph.window = window(contract.kv)
    graph.last_index = graph.constant("last_index", [-1])
    graph.attention = (*_sequence_lengths(graph), *_rope(graph, contract.kv.context_length))
    x = _rotate(graph, _embed(graph), ROTATE_IN)
    names = model.architecture.norm_names()
    normed = _first_norm(graph, x, names[0])
    last = model.architecture.num_hidden_layers - 1
    for i in range(last + 1):
        attended = _attend(graph, normed, i)
        if i == last and contract.logits == "last":  # nothing after the last cache needs the other positions
            attended, x = _last_position(graph, attended), _last_position(graph, x)
        normed, x = _add_norm(graph, x, _project_out(graph, attended, i), names[2 * i + 1])
        normed, x = _add_norm(graph, x, _feed_forward(graph, normed, i), names[2 * i + 2])
    _head(graph, _rotate(graph, normed, ROTATE_OUT))
    return _assemble(graph, contract)


def _assemble(graph: Graph, contract: IOContract) -> Any:
    """Nodes, initializers and the interface as one ModelProto."""
    inputs, outputs = ([_value_info(spec) for spec in specs] for specs in (contract.inputs, contract.outputs))
    body = helper.make_graph(graph.nodes, "llama", inputs, outputs, graph.data.tensors)
    opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS]
    return helper.make_model(body, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="llama-on-device")


def _value_info(spec: TensorSpec) -> Any:
    return helper.make_tensor_value_info(spec.name, _ELEMENT_TYPES[spec.dtype], spec.shape)


def _sequence_lengths(graph: Graph) -> tuple[str, str]:
    """From the mask [B, T]: last position of each sequence, int32 [B], and T, int32 [1].

    GroupQueryAttention derives its own mask from them, a causal one from slot 0 on, and would answer a padded sequence
    wrongly. So a gather out of one element by the number of padded slots fails where there are any.
    """
    count = graph.node("ReduceSum", ["attention_mask", graph.constant("axis_1", [1])], "tokens", {"keepdims": 0})
    total = graph.node("Shape", ["attention_mask"], "total", {"start": 1, "end": 2})
    padding = graph.node("Sub", [total, count], "padding")
    minus_one = graph.node("Gather", [graph.last_index, padding], _UNPADDED)
    last = graph.node("Add", [count, minus_one], "last_position")
    return (
        graph.node("Cast", [last], "seqlens_k", {"to": TensorProto.INT32}),
        graph.node("Cast", [total], "total_sequence_length", {"to": TensorProto.INT32}),
    )


def _rope(graph: Graph, length: int) -> tuple[str, str]:
    """cos and sin for every position of the context, float32 [length, D/2]."""
    cos, sin = rope_tables(graph.architecture, length)
    return graph.data.add("cos_cache", cos.numpy()), graph.data.add("sin_cache", sin.numpy())


def _embed(graph: Graph) -> str:
    """input_ids [B, S] → [B, S, hidden]."""
    scheme = graph.scheme(EMBEDDING)
    if scheme is None:
        graph.embedding = graph.float_weight(EMBEDDING)
        return graph.node("Gather", [graph.embedding, "input_ids"], "embedded")
    codes = graph.add_codes(EMBEDDING, [EMBEDDING], scheme)
    graph.embedding = codes
    # The gather takes codes and scales of one rank. Reshaping the scales (and the few rows gathered) rather than the
    # codes leaves one copy of the codes in memory too: onnxruntime folds a reshape of a constant into a new constant.
    shape = graph.constant("embedding_scale_shape", [codes.rows, codes.blocks, 1])
    scale = graph.node("Reshape", [_block_scales(graph, codes), shape], "embedding_scale")
    attributes = {"bits": codes.bits, "block_size": codes.block, "gather_axis": 0, "quantize_axis": 2}
    rows = graph.node("GatherBlockQuantized", [codes.q, "input_ids", scale], "embedded_blocks", attributes)
    return graph.node("Reshape", [rows, graph.constant("embedded_shape", [0, 0, codes.columns])], "embedded")


def _rotate(graph: Graph, x: str, name: str) -> str:
    """Rotate the residual stream, or rotate it back before the head, if the model is a rotated one."""
    return _linear(graph, x, name, [name]) if graph.architecture.rotated else x


def _first_norm(graph: Graph, x: str, name: str) -> str:
    """RMSNorm of the embedding."""
    attributes = {"axis": -1, "epsilon": graph.architecture.rms_norm_eps, "stash_type": 1}
    return graph.node("SimplifiedLayerNormalization", [x, graph.float_weight(name)], f"{name}.out", attributes)


def _add_norm(graph: Graph, x: str, change: str, name: str) -> tuple[str, str]:
    """Residual sum and its RMSNorm in one node: (normed, sum)."""
    outputs = [f"{name}.out", "", "", f"{name}.sum"]
    if name == FINAL_NORM:  # the last sum is not used
        outputs = outputs[:1]
    attributes = {"epsilon": graph.architecture.rms_norm_eps}
    graph.node("SkipSimplifiedLayerNormalization", [x, change, graph.float_weight(name)], outputs, attributes)
    return outputs[0], outputs[-1]


def _attend(graph: Graph, x: str, i: int) -> str:
    """Grouped-query attention with RoPE and cache update in one node; past and present may share one buffer."""
    a, layer = graph.architecture, f"model.layers.{i}.self_attn"
    heads = {"num_heads": a.num_attention_heads, "kv_num_heads": a.num_key_value_heads}
    attributes: dict[str, int | str] = {**heads, "do_rotary": 1, **graph.window}
    past = (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
    outputs = [f"{layer}.out", f"present.{i}.key", f"present.{i}.value"]
    inputs = [*_project_qkv(graph, x, layer), *past, *graph.attention]
    if graph.cache_scales:
        names = [f"{layer}.{kind}_scale" for kind in ("key", "value")]
        scales = map(graph.data.add, names, graph.cache_scales[2 * i : 2 * i + 2])
        inputs += ["", "", "", *scales]  # no position ids, attention bias or head sink
        attributes |= INT8_CACHE
    return graph.node("GroupQueryAttention", inputs, outputs, attributes)


def _project_out(graph: Graph, attended: str, i: int) -> str:
    name = f"model.layers.{i}.self_attn.o_proj.weight"
    return _linear(graph, attended, name, [name])


def _last_position(graph: Graph, x: str) -> str:
    """[B, S, N] → [B, 1, N]."""
    return graph.node("Gather", [x, graph.last_index], f"{x}.last", {"axis": 1})


def _project_qkv(graph: Graph, x: str, layer: str) -> tuple[str, str, str]:
    """Query, key and value inputs; if all three weights have one scheme, one product whose output the node splits."""
    names = [f"{layer}.{kind}_proj.weight" for kind in "qkv"]
    if len({graph.scheme(name) for name in names}) == 1:
        return _linear(graph, x, f"{layer}.qkv_proj.weight", names), "", ""
    query, key, value = (_linear(graph, x, name, [name]) for name in names)
    return query, key, value


def _feed_forward(graph: Graph, x: str, i: int) -> str:
    """SwiGLU: down(silu(gate(x)) · up(x))."""
    layer = f"model.layers.{i}.mlp"
    gate, up = _project_gate_up(graph, x, layer)
    silu = graph.node("QuickGelu", [gate], f"{layer}.silu", {"alpha": 1.0})  # x · sigmoid(alpha · x)
    product = graph.node("Mul", [silu, up], f"{layer}.product")
    return _linear(graph, product, f"{layer}.down_proj.weight", [f"{layer}.down_proj.weight"])


def _project_gate_up(graph: Graph, x: str, layer: str) -> tuple[str, str]:
    """Gate and up: if both have one scheme, one product with the stacked rows, and a split.

    One parallel section instead of two makes a decode step of SmolLM2-135M 3 % shorter on two cores.
    """
    names = [f"{layer}.{kind}_proj.weight" for kind in ("gate", "up")]
    if len({graph.scheme(name) for name in names}) == 1:
        gate_up = _linear(graph, x, f"{layer}.gate_up_proj.weight", names)
        parts = (f"{layer}.gate", f"{layer}.up")
        graph.node("Split", [gate_up], parts, {"axis": -1, "num_outputs": 2})
        return parts
    gate, up = (_linear(graph, x, name, [name]) for name in names)
    return gate, up


def _linear(graph: Graph, x: str, stored: str, names: Sequence[str]) -> str:
    """x [B, S, K] times the named weights stacked along their rows, stored as `stored`."""
    scheme = graph.scheme(names[0])
    if scheme is None:
        weights = [graph.model.weights.read(name).numpy() for name in names]
        stacked = np.concatenate(weights) if len(weights) > 1 else weights[0]
        return _multiply_float(graph, x, graph.data.add(stored, stacked), stored)
    codes = graph.add_codes(stored, names, scheme)
    level = _accuracy_level(stored, scheme, graph.architecture.num_hidden_layers)
    return _multiply(graph, x, codes, stored, level=level)


def _accuracy_level(stored: str, scheme: WeightScheme, layers: int) -> int:
    """MatMulNBits' level for a weight; 8-bit weights have no fast float kernel (40 times slower)."""
    return _FLOAT_ACTIVATIONS if scheme.bits == 4 and stored in sensitive(layers) else _INT8_ACTIVATIONS


def sensitive(layers: int) -> frozenset[str]:
    """Linears computed with float activations: early q/k/v, stacked or not; down_proj of the first and the last layer.

    With `accuracy_level` 4, MatMulNBits rounds activations to int8, one scale per block of the weight. The cost was
    measured linear by linear on SmolLM2-135M (int4 groups of 32; English, German, Hindi, Python; KL to the quantized
    model 0.0090 in all, to which the contributions add up): q/k/v of layers 0 to 7 cause 0.0021, those of the other
    22 layers 0.0011, down_proj of the first layer 0.0005, of the last 0.0003, of a typical one 0.00004. Errors in early
    queries and keys pass through every later softmax. In float these ten remove a third of the error for about 2 % of
    a decode step. The rest is spread evenly: all linears in float would remove the error and decode 1.35 times slower.
    """
    early = range(-(-layers // 4))
    qkv = {f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in early for kind in ("qkv", "q", "k", "v")}
    return frozenset(qkv | {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, layers - 1)})


def _multiply(graph: Graph, x: str, codes: Codes, name: str, *, level: int) -> str:
    """x [B, S, K] · codesᵀ."""
    attributes = {"K": codes.columns, "N": codes.rows, "block_size": codes.block}
    inputs = [x, codes.q, _block_scales(graph, codes)]
    if codes.levels != "even":
        return graph.node("MatMulBnb4", inputs, f"{name}.out", attributes | {"quant_type": BNB4_TYPES[codes.levels]})
    return graph.node("MatMulNBits", inputs, f"{name}.out", attributes | {"bits": codes.bits, "accuracy_level": level})


def _block_scales(graph: Graph, codes: Codes) -> str:
    """The stored scales as onnxruntime takes them, float32 [N, blocks].

    onnxruntime computes this once, when it loads the model, so the file holds half the bytes.
    """
    if codes.scale not in graph.scales:
        scale = graph.node("Cast", [codes.scale], f"{codes.scale}.float", {"to": TensorProto.FLOAT})
        if codes.per_channel:
            shape = graph.constant(f"{codes.scale}.shape", [codes.rows, codes.blocks])
            scale = graph.node("Expand", [scale, shape], f"{codes.scale}.blocks")
        graph.scales[codes.scale] = scale
    return graph.scales[codes.scale]


def _multiply_float(graph: Graph, x: str, weight: str, name: str) -> str:
    """x [B, S, K] · weightᵀ. The weight is not transposed in the file, so that a tied matrix is stored once."""
    return graph.node("FusedMatMul", [x, weight], f"{name}.out", {"transB": 1})


def _head(graph: Graph, x: str) -> None:
    """[B, S or 1, hidden] → logits [B, S or 1, V]; a tied head is the embedding's own initializer."""
    if not graph.architecture.tie_word_embeddings:
        out = _linear(graph, x, HEAD, [HEAD])
    elif isinstance(graph.embedding, Codes):
        out = _multiply(graph, x, graph.embedding, HEAD, level=_INT8_ACTIVATIONS)
    else:
        out = _multiply_float(graph, x, str(graph.embedding), HEAD)
    graph.nodes[-1].output[0] = graph.nodes[-1].name = "logits"
    assert out == f"{HEAD}.out"


def facts(proto: Any, architecture: Architecture) -> dict[str, int | float | str]:
    """Node counts, and the bytes saved by storing a tied embedding once."""
    counts = Counter(node.op_type for node in proto.graph.node)
    levels = Counter(entry.i for node in proto.graph.node for entry in node.attribute if entry.name == "accuracy_level")
    shared = 0
    if architecture.tie_word_embeddings:
        shared = sum(
            external_data_helper.ExternalDataInfo(tensor).length
            for tensor in proto.graph.initializer
            if tensor.name.startswith(EMBEDDING) and external_data_helper.uses_external_data(tensor)
        )
    return {
        "nodes": sum(counts.values()),
        "matmul_nbits_nodes": counts["MatMulNBits"],
        "matmul_bnb4_nodes": counts["MatMulBnb4"],
        "float_activation_nodes": levels[_FLOAT_ACTIVATIONS],
        "float_matmul_nodes": counts["FusedMatMul"],
        "group_query_attention_nodes": counts["GroupQueryAttention"],
        "shared_embedding_bytes": shared,
    }
