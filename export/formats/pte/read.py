"""ExecuTorch programs read from their flatbuffers. Only `structure` uses the runtime, to verify without running."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from export.architecture import EMBEDDING, Architecture
from export.formats import Contents, Entry, StoredTensor, counted, head, in_a_line, size
from export.manifest import TensorSpec

from .file import PteFile, open_pte, read_weights, tensor_value, xnnpack_graph

__all__ = ["FORMAT", "contents", "product_bytes", "read_weights", "recognizes", "structure"]

FORMAT = "ExecuTorch program"
_XNNPACK = "XnnpackBackend"
_EXTERNAL_INPUT = 1
"""XNN_VALUE_FLAG_EXTERNAL_INPUT: a value that the program passes to the delegate."""
_UPDATES = ("llama::update_cache", "llama::update_cache_with_indices")
_SCALAR_TYPES = {"BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16"}
_SCALAR_TYPES |= {"FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool", "BFLOAT16": "bfloat16"}
_XNN_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "qcint8": "int8", "qcint4": "int4"}
_XNN_TYPES |= {"qbint4": "int4", "qint8": "int8", "qcint32": "int32", "int32": "int32"}


@dataclass
class _Inventory:
    """The tensors and ops met on the walk along a program."""

    file: PteFile
    names: dict[str, list[tuple[str, tuple[int, ...]]]]
    """Names of linears and norms that are still to come, in execution order."""
    tensors: list[StoredTensor] = field(default_factory=list)
    delegated: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    """Keys of constants counted already."""
    constant_names: dict[int, str] = field(default_factory=dict)
    """Index of a constant of the program → the checkpoint's name."""

    def next_name(self, kind: str, shape: tuple[int, ...]) -> str | None:
        """Take the next name of a `linear` or `norm`, if its shape is the given one."""
        waiting = self.names[kind]
        return waiting.pop(0)[0] if waiting and waiting[0][1] == shape else None

    def add(self, tensor: StoredTensor, key: str) -> None:
        """Add a tensor, without its bytes if the same constant was counted before."""
        known = key in self.seen
        self.seen.add(key)
        self.tensors.append(tensor.model_copy(update={"bytes": 0}) if known else tensor)


def recognizes(path: Path) -> bool:
    """The flatbuffer's file identifier, `ET` and a version."""
    return head(path, 8)[4:6] == b"ET"


def contents(path: Path, architecture: Architecture | None) -> Contents:
    """Methods, buffers, kernels and delegates. Weights, nameless in the file, are named in execution order."""
    file = open_pte(path)
    plans = file.program.execution_plan
    inventory = _Inventory(file, _names_in_order(architecture))
    for plan in plans:
        _walk(inventory, plan)
        _program_constants(inventory, plan)
    calls = [(plan, call) for plan in plans for call in _instructions(plan)]
    return Contents(
        format=FORMAT,
        facts={
            "schema version": str(file.program.version),
            "planned memory": " + ".join(map(str, plans[0].non_const_buffer_sizes[1:])) + " bytes",
        },
        entries=tuple(_entry(plan) for plan in plans),
        cache=tuple(dict.fromkeys(buffer for plan in plans for buffer in _cache(plan))),
        ops=counted(_operator_name(plan, call) for plan, call in calls if hasattr(call, "op_index")),
        delegate_calls=counted(
            plan.delegates[call.delegate_index].id for plan, call in calls if hasattr(call, "delegate_index")
        ),
        delegated_ops=counted(inventory.delegated.elements()),
        tensors=tuple(inventory.tensors),
        bytes=path.stat().st_size,
    )


def _names_in_order(architecture: Architecture | None) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """The checkpoint's names of linears and norms in execution order, with their shapes."""
    if architecture is None:
        return {"linear": [], "norm": []}
    shapes = architecture.tensor_shapes()
    norms = [(name, shapes[name]) for name in architecture.norm_names()]
    return {"linear": [*architecture.all_linear_shapes().items()], "norm": norms}


def _instructions(plan: Any) -> Iterator[Any]:
    yield from (instruction.instr_args for chain in plan.chains for instruction in chain.instructions or ())


def _operator_name(plan: Any, call: Any) -> str:
    operator = plan.operators[call.op_index]
    return f"{operator.name}.{operator.overload}".rstrip(".")


def _entry(plan: Any) -> Entry:
    """One method; inputs and outputs have positions, no names."""
    inputs, outputs = ([plan.values[i].val for i in side] for side in (plan.inputs, plan.outputs))
    constant = not inputs and not any(type(output).__name__ == "Tensor" for output in outputs)
    return Entry(
        name=plan.name,
        inputs=tuple(_spec("", value) for value in inputs),
        outputs=() if constant else tuple(_spec("", value) for value in outputs),
        value=", ".join(_literal(value) for value in outputs) if constant else None,
    )


def _literal(value: Any) -> str:
    """A number, text or list that a method returns."""
    return str(next(iter(vars(value).values()), None))


def _spec(name: str, value: Any) -> TensorSpec:
    """A tensor of the program; a size that may be smaller at run time is written `≤512`. Other values have no shape."""
    if type(value).__name__ != "Tensor":
        return TensorSpec(name=name, dtype=type(value).__name__.lower(), shape=())
    bounded = value.shape_dynamism.name != "STATIC"
    dims = tuple(f"≤{count}" if bounded and count > 1 else count for count in value.sizes)
    return TensorSpec(name=name, dtype=_dtype(value), shape=dims)


def _dtype(tensor: Any) -> str:
    name = str(tensor.scalar_type.name)
    return _SCALAR_TYPES.get(name, name.lower())


def _cache(plan: Any) -> Iterator[TensorSpec]:
    """The buffers that cache operators write, in order of their first use."""
    buffers = dict.fromkeys(
        call.args[1]
        for call in _instructions(plan)
        if hasattr(call, "op_index") and plan.operators[call.op_index].name in _UPDATES
    )
    for number, index in enumerate(buffers):
        yield _spec(f"cache {number}", plan.values[index].val)


def _walk(inventory: _Inventory, plan: Any) -> None:
    """Name the constants that linears and norms of the delegates and the embedding kernel read."""
    for call in _instructions(plan):
        if hasattr(call, "delegate_index"):
            delegate = plan.delegates[call.delegate_index]
            graph = _delegate_graph(inventory, delegate, call.delegate_index)
            if graph is not None:
                _walk_delegate(inventory, plan, call, graph)
        elif hasattr(call, "op_index") and "embedding" in plan.operators[call.op_index].name:
            for index in call.args[:2]:
                value = plan.values[index].val
                if type(value).__name__ == "Tensor" and value.data_buffer_idx:
                    inventory.constant_names[value.data_buffer_idx] = EMBEDDING


def _delegate_graph(inventory: _Inventory, delegate: Any, number: int) -> Any:
    """XNNPACK's graph of a delegate; the bytes of any other delegate are counted as one opaque tensor."""
    reference = delegate.processed
    inline = reference.location.name == "INLINE"
    data = (
        inventory.file.program.backend_delegate_data[reference.index].data
        if inline
        else inventory.file.segments[reference.index]
    )
    if delegate.id == _XNNPACK:
        return xnnpack_graph(memoryview(bytes(data)) if inline else data)
    inventory.add(
        StoredTensor(name=f"{delegate.id} {number}", kind="weight", dtype="opaque", shape=(), bytes=len(data)),
        f"delegate {reference.location.name} {reference.index}",
    )
    return None


def _walk_delegate(inventory: _Inventory, plan: Any, call: Any, graph: Any) -> None:
    """Constants of one XNNPACK graph, in execution order; weights of norms are constants of the program, passed in."""
    values = {tensor_value(value)["id_out"]: value for value in graph["xvalues"]}
    for node in graph["xnodes"]:
        kind, union = node["xnode_union_type"], node["xnode_union"]
        inventory.delegated[kind.removeprefix("XNN")] += 1
        operands = [values[union[key]] for key in union if key.endswith("_id") and union[key] in values]
        for value in operands:
            tensor = tensor_value(value)
            shape = tuple(tensor["dims"])
            if tensor["constant_buffer_idx"]:
                filtering = kind == "XNNFullyConnected" and tensor["id_out"] == union["filter_id"]
                name = inventory.next_name("linear", shape) if filtering else None
                _add_constant(inventory, graph, value, name)
            elif kind == "XNNMultiply" and tensor["flags"] & _EXTERNAL_INPUT and tensor["external_id"] < len(call.args):
                _name_norm(inventory, plan.values[call.args[tensor["external_id"]]].val)


def _name_norm(inventory: _Inventory, value: Any) -> None:
    """Name a constant of the program that a delegate multiplies with."""
    index = value.data_buffer_idx if type(value).__name__ == "Tensor" else 0
    if index and index not in inventory.constant_names and (name := inventory.next_name("norm", (prod(value.sizes),))):
        inventory.constant_names[index] = name


def _add_constant(inventory: _Inventory, graph: Any, value: Any, name: str | None) -> None:
    """Add a constant of a delegate, with its scales."""
    tensor, data = tensor_value(value), graph["constant_data"]
    kind = tensor["datatype"].removeprefix("xnn_datatype_")
    buffer = data[tensor["constant_buffer_idx"]]
    key = buffer["named_key"] or f"{id(graph)} {buffer['offset']}"
    if name is None and key in inventory.seen:
        return  # a constant that every layer shares
    quantization = value["xvalue_union"].get("quant_params", {})
    name = name or (f"linear.{len(inventory.tensors)}.weight" if quantization else f"constant {len(inventory.tensors)}")
    stored = StoredTensor(
        name=name,
        kind="weight",
        dtype=_XNN_TYPES.get(kind, kind),
        shape=tuple(tensor["dims"]),
        bytes=0 if _is_tied(inventory.file, buffer["named_key"]) else buffer["size"],
    )
    inventory.add(stored, key)
    if count := quantization.get("num_scales", 0):
        buffer = data[quantization["scale_buffer_idx"]]
        rows = tensor["dims"][0]
        scales = StoredTensor(
            name=name,
            kind="scales",
            dtype="bfloat16" if buffer["size"] == 2 * count else "float32",
            shape=(rows, count // rows),
            bytes=buffer["size"],
        )
        inventory.add(scales, buffer["named_key"] or f"{id(graph)} {buffer['offset']}")


def _is_tied(file: PteFile, key: str) -> bool:
    """Whether a named constant lies inside the program's constant segment: a tied table, counted there."""
    index = next((entry.segment_index for entry in file.program.named_data or () if key and entry.key == key), None)
    if index is None or file.program.constant_segment is None:
        return False
    own, constants = file.program.segments[index], file.program.segments[file.program.constant_segment.segment_index]
    return bool(constants.offset <= own.offset < constants.offset + constants.size)


def _program_constants(inventory: _Inventory, plan: Any) -> None:
    """Add the program's own constants."""
    for value in (slot.val for slot in plan.values):
        if type(value).__name__ != "Tensor" or not value.data_buffer_idx or value.allocation_info is not None:
            continue
        name, shape = inventory.constant_names.get(value.data_buffer_idx), tuple(value.sizes)
        scales = name == EMBEDDING and len(shape) == 1
        extra = value.extra_tensor_info
        stored = StoredTensor(
            name=name or (extra and extra.fully_qualified_name) or f"program constant {value.data_buffer_idx}",
            kind="scales" if scales else "weight",
            dtype=_dtype(value),
            shape=(*shape, 1) if scales else shape,
            bytes=size(_dtype(value), shape),
        )
        if (key := f"program {value.data_buffer_idx}") not in inventory.seen:
            inventory.add(stored, key)


def structure(path: Path) -> Iterator[str]:
    """The runtime's strict verification of the flatbuffer, and segments that are incomplete."""
    # the module behind `portable_lib`, which would import the compiler
    import torch  # noqa: F401  (its libraries)
    from executorch.extension.pybindings._C import Verification, _load_program

    try:
        _load_program(str(path), program_verification=Verification.InternalConsistency)
    except RuntimeError as error:
        yield f"{path.name}: refused by ExecuTorch's strict verification ({in_a_line(error)})"
        return
    file = open_pte(path)
    for number, (segment, data) in enumerate(zip(file.program.segments, file.segments, strict=True)):
        if len(data) != segment.size:
            yield f"{path.name}: segment {number} ends after the file"


def product_bytes(artifact: Path) -> int | None:
    """None: they are not told apart from the delegates' other data."""
    del artifact
    return None
