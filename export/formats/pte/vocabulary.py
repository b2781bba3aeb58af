"""What lowering leaves in a `.pte`, and whether a finished program holds anything else.

The program is read by the numbers of its schema (executorch/exir/_serialize/program.fbs): executorch's own reader
takes longer to import than a chat to start.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatbuffers import number_types
from flatbuffers.table import Table

from export.errors import ExportError
from export.manifest import Manifest

from . import FILES, methods

OPERATORS = frozenset({
    "aten::_local_scalar_dense", "aten::embedding.out", "aten::select_copy.int_out", "aten::slice_copy.Tensor_out",
    "aten::sym_size.int", "aten::unsqueeze_copy.out", "executorch_prim::add.Scalar", "llama::custom_sdpa.out",
    "llama::update_cache.out", "quantized_decomposed::embedding_byte.dtype_out",
})  # fmt: skip
_DELEGATE = "XnnpackBackend"
_FORWARD = "forward"
_LARGEST_BYTES = 2**26
"""Of a program without its segments; Llama 3.2's take less than a megabyte."""
_CALLS = (1, 2)
"""InstructionArguments: KernelCall, DelegateCall."""
_INT, _BOOL, _TENSOR = 2, 3, 5
"""KernelTypes."""


class _Record:
    """A table of a flatbuffer; its fields are numbered as in the schema."""

    def __init__(self, data: bytes, at: int) -> None:
        self.table = Table(data, at)

    def _at(self, field: int) -> int:
        """Where a field lies; 0 where it is not set."""
        offset: int = self.table.Offset(4 + 2 * field)
        return offset and self.table.Pos + offset

    def number(self, field: int, kind: Any = number_types.Uint32Flags) -> int:
        at = self._at(field)
        return int(self.table.Get(kind, at)) if at else 0

    def text(self, field: int) -> str:
        at = self._at(field)
        return self.table.String(at).decode() if at else ""

    def record(self, field: int) -> "_Record | None":
        at = self._at(field)
        return _Record(self.table.Bytes, self.table.Indirect(at)) if at else None

    def _elements(self, field: int, size: int) -> Iterator[int]:
        """Where each element of a list lies."""
        if at := self._at(field):
            begin = at - self.table.Pos
            start, count = self.table.Vector(begin), self.table.VectorLen(begin)
            if count * size > len(self.table.Bytes):
                raise ValueError("a list that is longer than the file")
            yield from range(start, start + count * size, size)

    def records(self, field: int) -> "list[_Record]":
        return [_Record(self.table.Bytes, self.table.Indirect(at)) for at in self._elements(field, 4)]

    def numbers(self, field: int, kind: Any) -> list[int]:
        return [int(self.table.Get(kind, at)) for at in self._elements(field, kind.bytewidth)]


def foreign(folder: Path, described: Manifest) -> Iterator[str]:
    """Everything in the program that a build does not write."""
    path = folder / FILES[0]
    yield from (f"{path}: {line}; refused" for line in _parts(_program(path), described))


def _program(path: Path) -> _Record:
    """Raises ExportError: not a program with segments."""
    with path.open("rb") as file:
        head = file.read(32)
        size = int.from_bytes(head[16:24], "little")
        if head[4:6] != b"ET" or head[8:12] != b"eh00" or not 32 <= size <= _LARGEST_BYTES:
            raise ExportError(f"{path}: not a whole .pte file; build it again")
        data = head + file.read(size - len(head))
    return _Record(data, struct.unpack_from("<I", data)[0])


def _parts(program: _Record, described: Manifest) -> Iterator[str]:
    """Of the program: methods, operators, delegates and data that are none of ours."""
    expected = methods(described.architecture, described.contract, described.tokenizer)
    plans = program.records(1)
    names = Counter(plan.text(0) for plan in plans)
    yield from (f"method {name!r}" for name, count in names.items() if count > 1 or name not in {_FORWARD, *expected})
    yield from (f"no method {name!r}" for name in (_FORWARD, *expected) if name not in names)
    if program.records(3) or program.records(6):
        yield "data inside the program"
    for plan in plans:
        name = plan.text(0)
        allowed = OPERATORS if name == _FORWARD else frozenset[str]()
        yield from (f"operator {operator!r}" for operator in sorted(_operators(plan) - allowed))
        yield from _delegates(plan)
        if name in expected and _returned(plan) != (value := _listed(expected[name])):
            yield f"{name} returns {_returned(plan)}, the manifest has {value}"


def _listed(value: int | list[int]) -> list[int]:
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
    for value in plan.records(2):
        tensor = value.record(1) if value.number(0, number_types.Uint8Flags) == _TENSOR else None
        if tensor and tensor.record(9):
            yield "a tensor whose data lies in another file"


def _returned(plan: _Record) -> list[int | None]:
    """What a method without instructions returns; None for what is neither number nor flag."""
    values = plan.records(2)
    return [_number(values[index]) for index in plan.numbers(4, number_types.Int32Flags)]


def _number(value: _Record) -> int | None:
    kind = {_INT: number_types.Int64Flags, _BOOL: number_types.BoolFlags}.get(value.number(0, number_types.Uint8Flags))
    inner = value.record(1)
    return inner.number(0, kind) if kind and inner else None
