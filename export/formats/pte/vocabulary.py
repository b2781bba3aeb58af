"""What lowering leaves in a `.pte`, and whether a finished program holds anything else.

Both are read by the numbers of their schemas, executorch/exir/_serialize/program.fbs and, for the graph inside of a
delegate, backends/xnnpack/serialization/runtime_schema.fbs: executorch's own readers take longer to import than a chat
to start.
"""

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from flatbuffers import number_types
from flatbuffers.table import Table

from export.errors import ExportError
from export.manifest import Manifest

from . import FILES, methods

_OPERATORS = frozenset({
    "aten::_local_scalar_dense", "aten::_to_copy.out", "aten::embedding.out", "aten::select_copy.int_out",
    "aten::slice_copy.Tensor_out", "aten::sym_size.int", "aten::unsqueeze_copy.out", "executorch_prim::add.Scalar",
    "llama::custom_quantized_sdpa.out", "llama::custom_sdpa.out", "llama::update_cache.out",
    "quantized_decomposed::choose_qparams_per_token_asymmetric.out",
    "quantized_decomposed::embedding_byte.dtype_out", "quantized_decomposed::quantize_per_token.out",
})  # fmt: skip
_WINDOW = frozenset({
    "aten::ge.Scalar_out", "aten::logical_and.out", "aten::lt.Scalar_out", "aten::remainder.Scalar_out",
    "aten::sub.out", "aten::where.self_out", "llama::update_cache_with_indices.out",
})  # fmt: skip
"""Of slots that are taken again, and masks."""
_DELEGATE = "XnnpackBackend"
_NODES = {1: "Add", 2: "FullyConnected", 4: "Sigmoid", 15: "Multiply", 18: "Convert", 20: "StaticReshape"}
_NODES |= {40: "ReciprocalSquareRoot"}
"""Kinds of nodes in XNNPACK's graphs: number → name without `XNN`."""
_DATATYPES = {1: "fp32", 6: "qcint8", 8: "qcint4", 9: "qdint8", 10: "qbint4"}
_GRAPH_HEAD = struct.Struct("<4s4sHIIIQ")
"""XNNHeader: zeros, XH00, its length, offset and size of the graph, offset and size of data beside it."""
_FORWARD = "forward"
_LARGEST_BYTES = 2**24
"""Of a program without its segments, or of a delegate's graph; Llama 3.2's take less than a megabyte."""
_MOST_ELEMENTS = 2**19
"""That are read of the lists of one of these; Llama 3.2's have some thousands. Lists may lie in each other's bytes."""
_CALLS = (1, 2)
"""InstructionArguments: KernelCall, DelegateCall."""
_INT, _BOOL, _DOUBLE, _TENSOR = 2, 3, 4, 5
"""KernelTypes."""
_QUANTIZED = 2
"""XNNQuantizedTensorValue of XValueUnion."""


class _Record:
    """A table of a flatbuffer; its fields are numbered as in the schema."""

    def __init__(self, data: bytes, at: int, left: Iterator[int]) -> None:
        self.table, self.left = Table(data, at), left

    def _another(self, at: int) -> "_Record":
        return _Record(self.table.Bytes, self.table.Indirect(at), self.left)

    def _at(self, field: int) -> int:
        """Where a field lies; 0 where it is not set."""
        offset: int = self.table.Offset(4 + 2 * field)
        return offset and self.table.Pos + offset

    def number(self, field: int, kind: Any = number_types.Uint32Flags) -> int:
        at = self._at(field)
        return int(self.table.Get(kind, at)) if at else 0

    def real(self, field: int) -> float:
        at = self._at(field)
        return float(self.table.Get(number_types.Float64Flags, at)) if at else 0.0

    def text(self, field: int) -> str:
        at = self._at(field)
        return self.table.String(at).decode() if at else ""

    def record(self, field: int) -> "_Record | None":
        at = self._at(field)
        return self._another(at) if at else None

    def _elements(self, field: int, size: int) -> Iterator[int]:
        """Where each element of a list lies."""
        if at := self._at(field):
            begin = at - self.table.Pos
            start, count = self.table.Vector(begin), self.table.VectorLen(begin)
            for place in range(start, start + count * size, size):
                if next(self.left, None) is None:
                    raise ValueError("longer lists than any of ours")
                yield place

    def records(self, field: int) -> "list[_Record]":
        return [self._another(at) for at in self._elements(field, 4)]

    def numbers(self, field: int, kind: Any) -> list[int]:
        return [int(self.table.Get(kind, at)) for at in self._elements(field, kind.bytewidth)]


def foreign(folder: Path, described: Manifest) -> Iterator[str]:
    """Everything in the program that a build does not write."""
    path = folder / FILES[0]
    with path.open("rb") as file:
        head = file.read(32)
        size, base = struct.unpack_from("<QQ", head.ljust(32, b"\0"), 16)
        if head[4:6] != b"ET" or head[8:12] != b"eh00" or not 32 <= size <= _LARGEST_BYTES:
            raise ExportError(f"{path}: not a whole .pte file; build it again")
        program = _root(head + file.read(size - len(head)))
        for line in _parts(program, described) or _delegated(program, file, base):
            yield f"{path}: {line}; refused"


def _root(data: bytes) -> _Record:
    return _Record(data, struct.unpack_from("<I", data)[0], iter(range(_MOST_ELEMENTS)))


def _parts(program: _Record, described: Manifest) -> list[str]:
    """Of the program: methods, operators, delegates and data that are none of ours."""
    expected = methods(described.architecture, described.contract, described.tokenizer)
    forward = _OPERATORS | (_WINDOW if described.contract.kv.window else frozenset())
    plans = program.records(1)
    names = Counter(plan.text(0) for plan in plans)
    found = [f"method {name!r}" for name, count in names.items() if count > 1 or name not in {_FORWARD, *expected}]
    found += [f"no method {name!r}" for name in (_FORWARD, *expected) if name not in names]
    if program.records(2) or program.records(3) or program.records(6):
        found.append("data inside the program")
    for plan in plans:
        name = plan.text(0)
        allowed = forward if name == _FORWARD else frozenset[str]()
        found += [f"operator {operator!r}" for operator in sorted(_operators(plan) - allowed)]
        found += _delegates(plan)
        found += _named_tensors(plan, {state.name: list(state.shape) for state in described.contract.states})
        if name in expected and _returned(plan) != (value := _listed(expected[name])):
            found.append(f"{name} returns {_returned(plan)}, the manifest has {value}")
    return found


def _listed(value: int | list[int] | list[float]) -> list[Any]:
    """A list is returned value by value."""
    return value if isinstance(value, list) else [int(value)]


def _operators(plan: _Record) -> set[str]:
    return {f"{operator.text(0)}.{operator.text(1)}".rstrip(".") for operator in plan.records(6)}


def _delegates(plan: _Record) -> Iterator[str]:
    """Delegates, instructions and tensors of a method that lead elsewhere."""
    for delegate in plan.records(7):
        place = delegate.record(1)
        if (
            delegate.text(0) != _DELEGATE
            or delegate.records(2)
            or place is None
            or not place.number(0, number_types.Int8Flags)
        ):
            yield f"delegate {delegate.text(0)!r}"
    kinds = {step.number(0, number_types.Uint8Flags) for chain in plan.records(5) for step in chain.records(2)}
    yield from (f"instruction of kind {kind}" for kind in sorted(kinds - {*_CALLS}))


def _named_tensors(plan: _Record, states: Mapping[str, list[int | str]]) -> Iterator[str]:
    """Tensors of a method with more than a place in its memory: the cache's buffers have a name, and no other has."""
    for value in plan.records(2):
        tensor = value.record(1) if value.number(0, number_types.Uint8Flags) == _TENSOR else None
        extra = tensor.record(9) if tensor else None
        if not tensor or not extra:
            continue
        if extra.number(0, number_types.Uint64Flags) or extra.number(2, number_types.Int8Flags):
            yield "a tensor whose data lies in another file"
        elif not tensor.record(6):
            yield "a named constant"
        elif states.get(name := extra.text(1)) != (sizes := tensor.numbers(2, number_types.Int32Flags)):
            yield f"a tensor named {name!r} of {sizes}, which the manifest's states are not"


def _delegated(program: _Record, file: BinaryIO, base: int) -> Iterator[str]:
    """What the graphs of the delegates hold; `base`: where the file's segments begin."""
    segments = program.records(4)
    for number, delegate in enumerate(delegate for plan in program.records(1) for delegate in plan.records(7)):
        place = delegate.record(1)
        assert place is not None  # or it is none of ours
        segment = segments[place.number(1)]
        offset, size = (segment.number(field, number_types.Uint64Flags) for field in (0, 1))
        yield from (f"XNNPACK graph {number} has {line}" for line in _graph(file, base + offset, size))


def _graph(file: BinaryIO, start: int, size: int) -> Iterator[str]:
    """Of one of XNNPACK's graphs: nodes, values and constants that are none of ours, which lie in named segments."""
    file.seek(start)
    zeros, magic, length, offset, graph_size, _, beside = _GRAPH_HEAD.unpack(file.read(_GRAPH_HEAD.size))
    if (zeros, magic, length) != (bytes(4), b"XH00", _GRAPH_HEAD.size) or offset + graph_size > size:
        yield "another head"
        return
    if graph_size > _LARGEST_BYTES:
        yield f"{graph_size} bytes"
        return
    file.seek(start + offset)
    graph = _root(file.read(graph_size))
    constants = graph.records(8)
    if beside or graph.records(6) or graph.numbers(7, number_types.Uint32Flags):
        yield "data inside of it"
    if any(one.number(1, number_types.Uint64Flags) and not one.text(2) for one in constants):
        yield "a constant without a name"
    for node in graph.records(1):
        if (kind := node.number(0, number_types.Uint8Flags)) not in _NODES:
            yield f"a node of kind {kind}"
        if node.record(3):
            yield "a node with bounds"
    yield from (line for value in graph.records(2) for line in _value(value, len(constants)))


def _value(value: _Record, constants: int) -> Iterator[str]:
    """Of a value in one of XNNPACK's graphs."""
    inner = value.record(1)
    tensor = inner.record(0) if inner and value.number(0, number_types.Uint8Flags) == _QUANTIZED else inner
    datatype = tensor.number(0, number_types.Int16Flags) if tensor else 0
    if datatype not in _DATATYPES:
        yield f"a value of datatype {datatype}"
    if tensor and tensor.number(3) >= max(constants, 1):
        yield f"a value whose constant is number {tensor.number(3)} of {constants}"


def _returned(plan: _Record) -> list[int | float | None]:
    """What a method without instructions returns; None for what is neither number nor flag."""
    values = plan.records(2)
    return [_number(values[index]) for index in plan.numbers(4, number_types.Int32Flags)]


def _number(value: _Record) -> int | float | None:
    which = value.number(0, number_types.Uint8Flags)
    if which == _DOUBLE:
        inner = value.record(1)
        return inner.real(0) if inner else None
    kind = {_INT: number_types.Int64Flags, _BOOL: number_types.BoolFlags}.get(which)
    inner = value.record(1)
    return inner.number(0, kind) if kind and inner else None
