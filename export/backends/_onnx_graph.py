"""The decoder as an ONNX graph with its cache as past/present tensors. Knows neither files nor recipes' names.

Shapes: B batch, S new tokens, P cache slots passed in, T tokens so far, H query heads, G key/value heads, D head_dim.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ..contract import IOContract, TensorSpec
from ..model import rope_tables
from ..plan import ROTATE_IN, ROTATE_OUT, Architecture, WeightScheme
from ..quantize import QuantizedModel
from ..schemes import EMBEDDING, HEAD
from ._onnx_activations import INT8_ACTIVATIONS, accuracy_level
from ._onnx_weights import BNB4_TYPES, Codes, DataFile

CONTRIB = {"FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulBnb4", "MatMulNBits", "QuickGelu"}
CONTRIB |= {"SkipSimplifiedLayerNormalization"}
"""onnxruntime's own operators, domain com.microsoft."""
OPSETS = (("", 21), ("com.microsoft", 1))
IR_VERSION = 10
ELEMENT_TYPES = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}


class Graph:
    """Nodes as they are added; initializers go straight to the data file."""

    def __init__(self, model: QuantizedModel, data: DataFile) -> None:
        self.model = model
        self.architecture: Architecture = model.architecture
        self.data = data
        self.nodes: list[Any] = []
        self.embedding: Codes | str | None = None
        """What a tied head multiplies with: codes, or the name of the float matrix."""
        self.scales: dict[str, str] = {}
        """Stored scales → the float32 scales of every block."""
        self.last_index = ""
        """Initializer [-1]."""
        self.attention: tuple[str, ...] = ()
        """Inputs every GroupQueryAttention shares: sequence lengths and RoPE tables."""

    def node(
        self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], attributes: Mapping[str, Any] | None = None
    ) -> str:
        """Add a node, named by its first output, which is returned."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        domain = "com.microsoft" if op in CONTRIB else ""
        self.nodes.append(helper.make_node(op, inputs, names, names[0], domain=domain, **(attributes or {})))
        return names[0]

    def constant(self, name: str, values: Sequence[int]) -> str:
        """A small int64 initializer inside model.onnx, where shape inference can see it."""
        array = np.array(values, np.int64)
        self.data.tensors.append(helper.make_tensor(name, TensorProto.INT64, array.shape, array))
        return name

    def float_weight(self, name: str) -> str:
        """A tensor of the checkpoint as float32, under its own name."""
        return self.data.add(name, self.model.read(name).numpy())

    def scheme(self, name: str) -> WeightScheme | None:
        return self.model.schemes.of(name)

    def add_codes(self, stored: str, names: Sequence[str], scheme: WeightScheme) -> Codes:
        """Quantized weights stacked along their rows, stored as `stored`."""
        weights = [codes for codes in map(self.model.codes, names) if codes]
        return self.data.add_codes(stored, weights, scheme, common_scales=self.model.recipe.common_scales)


def build(model: QuantizedModel, data: DataFile, contract: IOContract) -> Any:
    """The ModelProto; weights are appended to `data` in execution order."""
    graph = Graph(model, data)
    graph.last_index = graph.constant("last_index", [-1])
    graph.attention = (*sequence_lengths(graph), *rope(graph, contract.kv.context_length))
    x = rotate(graph, embed(graph), ROTATE_IN)
    names = norm_names(model.architecture)
    normed = first_norm(graph, x, names[0])
    last = model.architecture.num_hidden_layers - 1
    for i in range(last + 1):
        attended = attend(graph, normed, i)
        if i == last and contract.logits == "last":  # nothing after the last cache needs the other positions
            attended, x = last_position(graph, attended), last_position(graph, x)
        normed, x = add_norm(graph, x, project_out(graph, attended, i), names[2 * i + 1])
        normed, x = add_norm(graph, x, feed_forward(graph, normed, i), names[2 * i + 2])
    head(graph, rotate(graph, normed, ROTATE_OUT))
    return assemble(graph, contract)


def assemble(graph: Graph, contract: IOContract) -> Any:
    """Nodes, initializers and the interface as one ModelProto."""
    inputs, outputs = ([value_info(spec) for spec in specs] for specs in (contract.inputs, contract.outputs))
    body = helper.make_graph(graph.nodes, "llama", inputs, outputs, graph.data.tensors)
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="llama-on-device")


def value_info(spec: TensorSpec) -> Any:
    """One graph input or output."""
    return helper.make_tensor_value_info(spec.name, ELEMENT_TYPES[spec.dtype], spec.shape)


def sequence_lengths(graph: Graph) -> tuple[str, str]:
    """From the mask [B, T]: last position of each sequence, int32 [B], and T, int32 [1]."""
    count = graph.node("ReduceSum", ["attention_mask", graph.constant("axis_1", [1])], "tokens", {"keepdims": 0})
    last = graph.node("Sub", [count, graph.constant("one", [1])], "last_position")
    total = graph.node("Shape", ["attention_mask"], "total", {"start": 1, "end": 2})
    return (
        graph.node("Cast", [last], "seqlens_k", {"to": TensorProto.INT32}),
        graph.node("Cast", [total], "total_sequence_length", {"to": TensorProto.INT32}),
    )


def rope(graph: Graph, length: int) -> tuple[str, str]:
    """cos and sin for every position of the context, float32 [length, D/2]."""
    cos, sin = rope_tables(graph.architecture, length)
    return graph.data.add("cos_cache", cos.numpy()), graph.data.add("sin_cache", sin.numpy())


def embed(graph: Graph) -> str:
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
    scale = graph.node("Reshape", [block_scales(graph, codes), shape], "embedding_scale")
    attributes = {"bits": codes.bits, "block_size": codes.block, "gather_axis": 0, "quantize_axis": 2}
    rows = graph.node("GatherBlockQuantized", [codes.q, "input_ids", scale], "embedded_blocks", attributes)
    return graph.node("Reshape", [rows, graph.constant("embedded_shape", [0, 0, codes.columns])], "embedded")


def rotate(graph: Graph, x: str, name: str) -> str:
    """Turn the residual stream, or turn it back before the head; in a model that is not rotated as it is."""
    return linear(graph, x, name, [name]) if graph.architecture.rotated else x


def norm_names(architecture: Architecture) -> list[str]:
    """Weights of the norms in execution order: two per layer, then the last."""
    layers = range(architecture.num_hidden_layers)
    kinds = ("input_layernorm", "post_attention_layernorm")
    return [f"model.layers.{i}.{kind}.weight" for i in layers for kind in kinds] + ["model.norm.weight"]


def first_norm(graph: Graph, x: str, name: str) -> str:
    """RMS norm of the embedding."""
    attributes = {"axis": -1, "epsilon": graph.architecture.rms_norm_eps, "stash_type": 1}
    return graph.node("SimplifiedLayerNormalization", [x, graph.float_weight(name)], f"{name}.out", attributes)


def add_norm(graph: Graph, x: str, change: str, name: str) -> tuple[str, str]:
    """Residual sum and its RMS norm in one node: (normed, sum)."""
    outputs = [f"{name}.out", "", "", f"{name}.sum"]
    if name == "model.norm.weight":  # nobody reads the last sum
        outputs = outputs[:1]
    attributes = {"epsilon": graph.architecture.rms_norm_eps}
    graph.node("SkipSimplifiedLayerNormalization", [x, change, graph.float_weight(name)], outputs, attributes)
    return outputs[0], outputs[-1]


def attend(graph: Graph, x: str, i: int) -> str:
    """Grouped-query attention with RoPE and the cache update inside one node."""
    a, layer = graph.architecture, f"model.layers.{i}.self_attn"
    attributes = {"num_heads": a.num_attention_heads, "kv_num_heads": a.num_key_value_heads, "do_rotary": 1}
    past = (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
    outputs = [f"{layer}.out", f"present.{i}.key", f"present.{i}.value"]
    inputs = [*project_qkv(graph, x, layer), *past, *graph.attention]
    return graph.node("GroupQueryAttention", inputs, outputs, attributes)


def project_out(graph: Graph, attended: str, i: int) -> str:
    """The heads' outputs back to the residual stream."""
    name = f"model.layers.{i}.self_attn.o_proj.weight"
    return linear(graph, attended, name, [name])


def last_position(graph: Graph, x: str) -> str:
    """[B, S, N] → [B, 1, N]."""
    return graph.node("Gather", [x, graph.last_index], f"{x}.last", {"axis": 1})


def project_qkv(graph: Graph, x: str, layer: str) -> tuple[str, str, str]:
    """The query, key and value inputs: one product with the stacked rows when all three have one scheme."""
    names = [f"{layer}.{kind}_proj.weight" for kind in "qkv"]
    if len({graph.scheme(name) for name in names}) == 1:
        return linear(graph, x, f"{layer}.qkv_proj.weight", names), "", ""
    query, key, value = (linear(graph, x, name, [name]) for name in names)
    return query, key, value


def feed_forward(graph: Graph, x: str, i: int) -> str:
    """SwiGLU."""
    layer = f"model.layers.{i}.mlp"
    gate, up = project_gate_up(graph, x, layer)
    silu = graph.node("QuickGelu", [gate], f"{layer}.silu", {"alpha": 1.0})  # x · sigmoid(alpha · x)
    product = graph.node("Mul", [silu, up], f"{layer}.product")
    return linear(graph, product, f"{layer}.down_proj.weight", [f"{layer}.down_proj.weight"])


def project_gate_up(graph: Graph, x: str, layer: str) -> tuple[str, str]:
    """Gate and up: one product with the stacked rows, taken apart, when both have one scheme.

    One parallel section instead of two makes a decode step of SmolLM2-135M 3 % shorter on two cores.
    """
    names = [f"{layer}.{kind}_proj.weight" for kind in ("gate", "up")]
    if len({graph.scheme(name) for name in names}) == 1:
        both = linear(graph, x, f"{layer}.gate_up_proj.weight", names)
        parts = (f"{layer}.gate", f"{layer}.up")
        graph.node("Split", [both], parts, {"axis": -1, "num_outputs": 2})
        return parts
    gate, up = (linear(graph, x, name, [name]) for name in names)
    return gate, up


def linear(graph: Graph, x: str, stored: str, names: Sequence[str]) -> str:
    """x [B, S, K] times the named weights stacked along their rows, stored as `stored`."""
    scheme = graph.scheme(names[0])
    if scheme is None:
        return multiply_float(
            graph, x, graph.data.add(stored, stack([graph.model.read(name) for name in names])), stored
        )
    codes = graph.add_codes(stored, names, scheme)
    level = accuracy_level(stored, scheme, graph.architecture.num_hidden_layers)
    return multiply(graph, x, codes, stored, level=level)


def stack(weights: Sequence[Any]) -> NDArray[np.float32]:
    """Float matrices on top of each other."""
    return np.concatenate([weight.numpy() for weight in weights]) if len(weights) > 1 else weights[0].numpy()


def multiply(graph: Graph, x: str, codes: Codes, name: str, *, level: int) -> str:
    """x [B, S, K] · codesᵀ."""
    attributes = {"K": codes.columns, "N": codes.rows, "block_size": codes.block}
    inputs = [x, codes.q, block_scales(graph, codes)]
    if codes.levels != "even":
        return graph.node("MatMulBnb4", inputs, f"{name}.out", attributes | {"quant_type": BNB4_TYPES[codes.levels]})
    return graph.node("MatMulNBits", inputs, f"{name}.out", attributes | {"bits": codes.bits, "accuracy_level": level})


def block_scales(graph: Graph, codes: Codes) -> str:
    """The stored scales as onnxruntime wants them, float32 [N, blocks].

    onnxruntime computes this once, when it loads the model, so the file keeps half the bytes.
    """
    if codes.scale not in graph.scales:
        scale = graph.node("Cast", [codes.scale], f"{codes.scale}.float", {"to": TensorProto.FLOAT})
        if codes.per_channel:
            shape = graph.constant(f"{codes.scale}.shape", [codes.rows, codes.blocks])
            scale = graph.node("Expand", [scale, shape], f"{codes.scale}.blocks")
        graph.scales[codes.scale] = scale
    return graph.scales[codes.scale]


def multiply_float(graph: Graph, x: str, weight: str, name: str) -> str:
    """x [B, S, K] · weightᵀ; the checkpoint's own row order, so a tied matrix is stored once."""
    return graph.node("FusedMatMul", [x, weight], f"{name}.out", {"transB": 1})


def head(graph: Graph, x: str) -> None:
    """[B, S or 1, hidden] → logits [B, S or 1, V]; a tied head is the embedding's own initializer."""
    if not graph.architecture.tie_word_embeddings:
        out = linear(graph, x, HEAD, [HEAD])
    elif isinstance(graph.embedding, Codes):
        out = multiply(graph, x, graph.embedding, HEAD, level=INT8_ACTIVATIONS)
    else:
        out = multiply_float(graph, x, str(graph.embedding), HEAD)
    graph.nodes[-1].output[0] = graph.nodes[-1].name = "logits"
    assert out == f"{HEAD}.out"
