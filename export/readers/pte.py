"""ExecuTorch programs read from their flatbuffers. Only `structure` asks the runtime, which checks and runs nothing."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..backends.pte.readback import PteFile, open_pte, tensor_value, xnnpack_graph
from ..contents import EMBEDDING, Contents, Entry, StoredTensor, counted, size
from ..contract import TensorSpec
from ..plan import Architecture
from . import head, in_a_line

FORMAT = "ExecuTorch program"
XNNPACK = "XnnpackBackend"
EXTERNAL_INPUT = 1
"""XNN_VALUE_FLAG_EXTERNAL_INPUT: a value that the program passes to the delegate."""
SCALAR_TYPES = {"BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16"}
SCALAR_TYPES |= {"FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool", "BFLOAT16": "bfloat16"}
XNN_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "qcint8": "int8", "qcint4": "int4"}
XNN_TYPES |= {"qbint4": "int4", "qint8": "int8", "qcint32": "int32", "int32": "int32"}


@dataclass
class Found:
    """What the walk along a program has met."""

    file: PteFile
    names: dict[str, list[tuple[str, tuple[int, ...]]]]
    """Our names still to be met, in execution order: of linears and norms."""
    tensors: list[StoredTensor] = field(default_factory=list)
    delegated: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    """Keys of constants counted already."""
    constant_names: dict[int, str] = field(default_factory=dict)
    """Constants of the program under our names."""

    def next_name(self, kind: str, shape: tuple[int, ...]) -> str | None:
        """The next of our names, if it is of that shape."""
        waiting = self.names[kind]
        return waiting.pop(0)[0] if waiting and waiting[0][1] == shape else None

    def add(self, tensor: StoredTensor, key: str) -> None:
        """Count a tensor's bytes unless the same constant was counted before."""
        known = key in self.seen
        self.seen.add(key)
        self.tensors.append(tensor.model_copy(update={"bytes": 0}) if known else tensor)


def recognizes(path: Path) -> bool:
    """The flatbuffer's file identifier, `ET` and a version."""
    return head(path, 8)[4:6] == b"ET"


def contents(path: Path, architecture: Architecture | None) -> Contents:
    """Methods, buffers, kernels and delegates. Weights have no names in the file: they get ours in execution order."""
    file = open_pte(path)
    plans = file.program.execution_plan
    found = Found(file, expected(architecture))
    for plan in plans:
        walk(found, plan)
        constants(found, plan)
    calls = [(plan, call) for plan in plans for call in instructions(plan)]
    return Contents(
        format=FORMAT,
        facts={
            "schema version": str(file.program.version),
            "planned memory": " + ".join(str(one) for one in plans[0].non_const_buffer_sizes[1:]) + " bytes",
        },
        entries=tuple(entry(plan) for plan in plans),
        cache=tuple(dict.fromkeys(one for plan in plans for one in cache(plan))),
        ops=counted(operator_name(plan, call) for plan, call in calls if hasattr(call, "op_index")),
        delegate_calls=counted(
            plan.delegates[call.delegate_index].id for plan, call in calls if hasattr(call, "delegate_index")
        ),
        delegated_ops=counted(found.delegated.elements()),
        tensors=tuple(found.tensors),
        bytes=path.stat().st_size,
    )


def expected(architecture: Architecture | None) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our names of linears and norms in execution order, with their shapes."""
    if architecture is None:
        return {"linear": [], "norm": []}
    shapes, a = architecture.tensor_shapes(), architecture
    kinds = ("input_layernorm", "post_attention_layernorm")
    norms = [f"model.layers.{i}.{kind}.weight" for i in range(a.num_hidden_layers) for kind in kinds]
    return {
        "linear": [*a.all_linear_shapes().items()],
        "norm": [(name, shapes[name]) for name in [*norms, "model.norm.weight"]],
    }


def instructions(plan: Any) -> Iterator[Any]:
    """Calls of a method, in order."""
    yield from (one.instr_args for chain in plan.chains for one in chain.instructions or ())


def operator_name(plan: Any, call: Any) -> str:
    """`llama::update_cache.out`."""
    operator = plan.operators[call.op_index]
    return f"{operator.name}.{operator.overload}".rstrip(".")


def entry(plan: Any) -> Entry:
    """One method; inputs and outputs have positions, no names."""
    inputs, outputs = ([plan.values[i].val for i in side] for side in (plan.inputs, plan.outputs))
    constant = not inputs and not any(type(one).__name__ == "Tensor" for one in outputs)
    return Entry(
        name=plan.name,
        inputs=tuple(spec("", one) for one in inputs),
        outputs=() if constant else tuple(spec("", one) for one in outputs),
        value=", ".join(literal(one) for one in outputs) if constant else None,
    )


def literal(value: Any) -> str:
    """A number, text or list that a method returns."""
    return str(next(iter(vars(value).values()), None))


def spec(name: str, value: Any) -> TensorSpec:
    """A tensor of the program; a size that may be less at run time is written `≤512`. Other values have no shape."""
    if type(value).__name__ != "Tensor":
        return TensorSpec(name=name, dtype=type(value).__name__.lower(), shape=())
    bounded = value.shape_dynamism.name != "STATIC"
    dims = tuple(f"≤{one}" if bounded and one > 1 else one for one in value.sizes)
    return TensorSpec(name=name, dtype=dtype(value), shape=dims)


def dtype(tensor: Any) -> str:
    """ExecuTorch's scalar type under the name we use."""
    name = str(tensor.scalar_type.name)
    return SCALAR_TYPES.get(name, name.lower())


def cache(plan: Any) -> Iterator[TensorSpec]:
    """The buffers that cache operators write, in order of their first use."""
    used: dict[int, None] = {}
    for call in instructions(plan):
        if hasattr(call, "op_index") and plan.operators[call.op_index].name == "llama::update_cache":
            used[call.args[1]] = None
    for number, index in enumerate(used):
        yield spec(f"cache {number}", plan.values[index].val)


def walk(found: Found, plan: Any) -> None:
    """Name what linears and norms of the delegates and the embedding kernel read."""
    for call in instructions(plan):
        if hasattr(call, "delegate_index"):
            delegate = plan.delegates[call.delegate_index]
            graph = delegate_graph(found, delegate, call.delegate_index)
            if graph is not None:
                walk_delegate(found, plan, call, graph)
        elif hasattr(call, "op_index") and "embedding" in plan.operators[call.op_index].name:
            for index in call.args[:2]:
                value = plan.values[index].val
                if type(value).__name__ == "Tensor" and value.data_buffer_idx:
                    found.constant_names[value.data_buffer_idx] = EMBEDDING


def delegate_graph(found: Found, delegate: Any, number: int) -> Any:
    """XNNPACK's graph of a delegate; any other's bytes are counted as they are."""
    reference = delegate.processed
    inline = reference.location.name == "INLINE"
    data = (
        found.file.program.backend_delegate_data[reference.index].data
        if inline
        else found.file.segments[reference.index]
    )
    if delegate.id == XNNPACK:
        return xnnpack_graph(memoryview(bytes(data)) if inline else data)
    found.add(
        StoredTensor(name=f"{delegate.id} {number}", kind="weight", dtype="opaque", shape=(), bytes=len(data)),
        f"delegate {reference.location.name} {reference.index}",
    )
    return None


def walk_delegate(found: Found, plan: Any, call: Any, graph: Any) -> None:
    """Constants of one XNNPACK graph, in execution order; norms come in as the program's own constants."""
    values = {tensor_value(value)["id_out"]: value for value in graph["xvalues"]}
    for node in graph["xnodes"]:
        kind, union = node["xnode_union_type"], node["xnode_union"]
        found.delegated[kind.removeprefix("XNN")] += 1
        operands = [values[union[key]] for key in union if key.endswith("_id") and union[key] in values]
        for value in operands:
            tensor = tensor_value(value)
            shape = tuple(tensor["dims"])
            if tensor["constant_buffer_idx"]:
                filtering = kind == "XNNFullyConnected" and tensor["id_out"] == union["filter_id"]
                name = found.next_name("linear", shape) if filtering else None
                add_constant(found, graph, value, name)
            elif kind == "XNNMultiply" and tensor["flags"] & EXTERNAL_INPUT and tensor["external_id"] < len(call.args):
                name_norm(found, plan.values[call.args[tensor["external_id"]]].val)


def name_norm(found: Found, value: Any) -> None:
    """A constant of the program that a delegate multiplies with."""
    index = value.data_buffer_idx if type(value).__name__ == "Tensor" else 0
    if index and index not in found.constant_names and (name := found.next_name("norm", (prod(value.sizes),))):
        found.constant_names[index] = name


def add_constant(found: Found, graph: Any, value: Any, name: str | None) -> None:
    """A constant of a delegate, with its scales."""
    tensor, data = tensor_value(value), graph["constant_data"]
    kind = tensor["datatype"].removeprefix("xnn_datatype_")
    where = data[tensor["constant_buffer_idx"]]
    key = where["named_key"] or f"{id(graph)} {where['offset']}"
    if name is None and key in found.seen:
        return  # a constant that every layer shares
    quantization = value["xvalue_union"].get("quant_params", {})
    name = name or (f"linear.{len(found.tensors)}.weight" if quantization else f"constant {len(found.tensors)}")
    stored = StoredTensor(
        name=name,
        kind="weight",
        dtype=XNN_TYPES.get(kind, kind),
        shape=tuple(tensor["dims"]),
        bytes=0 if shared(found.file, where["named_key"]) else where["size"],
    )
    found.add(stored, key)
    if count := quantization.get("num_scales", 0):
        where = data[quantization["scale_buffer_idx"]]
        rows = tensor["dims"][0]
        scales = StoredTensor(
            name=name,
            kind="scales",
            dtype="bfloat16" if where["size"] == 2 * count else "float32",
            shape=(rows, count // rows),
            bytes=where["size"],
        )
        found.add(scales, where["named_key"] or f"{id(graph)} {where['offset']}")


def shared(file: PteFile, key: str) -> bool:
    """Whether a named constant lies inside the program's constant segment: a tied table, counted there."""
    index = next((one.segment_index for one in file.program.named_data or () if key and one.key == key), None)
    if index is None or file.program.constant_segment is None:
        return False
    own, constants_ = file.program.segments[index], file.program.segments[file.program.constant_segment.segment_index]
    return bool(constants_.offset <= own.offset < constants_.offset + constants_.size)


def constants(found: Found, plan: Any) -> None:
    """The program's own constants."""
    for value in (one.val for one in plan.values):
        if type(value).__name__ != "Tensor" or not value.data_buffer_idx or value.allocation_info is not None:
            continue
        name, shape = found.constant_names.get(value.data_buffer_idx), tuple(value.sizes)
        scales = name == EMBEDDING and len(shape) == 1
        extra = value.extra_tensor_info
        stored = StoredTensor(
            name=name or (extra and extra.fully_qualified_name) or f"program constant {value.data_buffer_idx}",
            kind="scales" if scales else "weight",
            dtype=dtype(value),
            shape=(*shape, 1) if scales else shape,
            bytes=size(dtype(value), shape),
        )
        if (key := f"program {value.data_buffer_idx}") not in found.seen:
            found.add(stored, key)


def escapes(path: Path) -> Iterator[str]:
    """None: a program finds external data by name, in a file that its caller gives."""
    del path
    yield from ()


def structure(path: Path) -> Iterator[str]:
    """The runtime's strict verification of the flatbuffer; segments that are not there in full."""
    from executorch.extension.pybindings.portable_lib import Verification, _load_program

    try:
        _load_program(str(path), program_verification=Verification.InternalConsistency)
    except RuntimeError as error:
        yield f"{path.name}: refused by ExecuTorch's strict verification ({in_a_line(error)})"
        return
    file = open_pte(path)
    for number, (segment, data) in enumerate(zip(file.program.segments, file.segments, strict=True)):
        if len(data) != segment.size:
            yield f"{path.name}: segment {number} ends after the file"
