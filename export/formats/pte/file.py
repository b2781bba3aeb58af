"""A finished `.pte`: its program, segments, integers and scales, read without any code of the lowering.

Linears are found in the delegates' own XNNPACK graphs (`backends/xnnpack/serialization/schema.fbs`), in execution
order; the embedding is an argument of the `embedding_byte` kernel call. `share_tied_table` stores a table once that is
both embedding and head.
"""

import json
import mmap
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from export.architecture import EMBEDDING, HEAD, Architecture
from export.errors import ExportError
from export.formats import StoredWeight
from export.host.imports import without_packages

# who reads a file need not wait for the compiler, three seconds in every process
with without_packages("executorch.exir", "executorch.backends.xnnpack"):
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnnpack
    from executorch.exir._serialize._flatbuffer import _flatc_decompile
    from executorch.exir._serialize._flatbuffer_program import (
        _flatbuffer_to_program,
        _patch_generated_flatbuffer_aliases,
    )
    from executorch.exir._serialize._program import _ExtendedHeader, _get_extended_header
    from executorch.exir._serialize.generated.executorch_flatbuffer.DataSegment import DataSegment
    from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program

Bytes = memoryview
_FLOATS = re.compile(r'"(?:[^"\\]|\\.)*"|-?\b(?:inf|nan)\b')
"""Floats that flatc writes and JSON does not have; strings match too, so that their contents are skipped."""
_SMALLEST = 64 * 1024
"""Bytes of the smallest segment that is looked for as a duplicate."""
_HEADER_AT = 8
_PIECE = 2**22
"""Bytes that are compared or moved at a time."""


@dataclass(frozen=True)
class PteFile:
    """The program, and its segments memory-mapped."""

    program: Any
    segments: list[Bytes]

    def named(self, key: str) -> Bytes:
        """Bytes that a delegate refers to by name."""
        index: int = next(entry.segment_index for entry in self.program.named_data if entry.key == key)
        return self.segments[index]

    def constant(self, index: int) -> Bytes:
        """A constant tensor's bytes, with the padding after it."""
        constants = self.program.constant_segment
        segment: Bytes = self.segments[constants.segment_index]
        ends = [*constants.offsets[1:], len(segment)]
        return segment[constants.offsets[index] : ends[index]]


def read_weights(artifact: Path, architecture: Architecture) -> Iterator[StoredWeight]:
    """The embedding, every quantized linear in execution order, and the head unless it is the embedding's."""
    file = open_pte(artifact)
    embedding = _read_embedding(file)
    if embedding:
        yield embedding
    names = list(architecture.all_linear_shapes())
    linears = list(quantized_linears(file))
    if linears and len(linears) != len(names):
        raise ExportError(f"{artifact}: {len(linears)} quantized linears, the architecture has {len(names)}")
    for name, (qdata, scale) in zip(names, linears, strict=False):
        if name == HEAD and architecture.tie_word_embeddings and embedding:
            if not (np.array_equal(embedding.qdata, qdata) and np.array_equal(embedding.scale, scale)):
                raise ExportError(
                    f"{artifact}: the head's integers are not the embedding's although the model ties them"
                )
        else:
            yield StoredWeight(name, qdata, scale)


def open_pte(artifact: Path) -> PteFile:
    """Map the file and parse its program. Raises ExportError: the file is not a whole `.pte`."""
    with artifact.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    header = _get_extended_header(bytes(data[:64]))
    if header is None or not header.is_valid() or header.segment_base_offset > len(data):
        raise ExportError(f"{artifact}: not a whole .pte file; build it again")
    program = _flatbuffer_to_program(bytes(data[: header.program_size]))
    base = header.segment_base_offset
    return PteFile(program, [data[base + s.offset : base + s.offset + s.size] for s in program.segments])


def _read_embedding(file: PteFile) -> StoredWeight | None:
    """Table and scales of the `embedding_byte` call; None if the embedding is float."""
    plan = file.program.execution_plan[0]
    operators = [operator.name for operator in plan.operators]
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if "embedding_byte" in operators[getattr(call, "op_index", 0)] and type(call).__name__ == "KernelCall":
            table, scale = (plan.values[i].val for i in call.args[:2])
            qdata = np.frombuffer(file.constant(table.data_buffer_idx), np.int8, count=int(np.prod(table.sizes)))
            scales = np.frombuffer(file.constant(scale.data_buffer_idx), np.float32, count=int(np.prod(scale.sizes)))
            return StoredWeight(EMBEDDING, qdata.reshape(table.sizes), scales.reshape(-1, 1))
    return None


def quantized_linears(file: PteFile) -> Iterator[tuple[NDArray[np.int8], NDArray[np.float32]]]:
    """Integers [N, K] and scales [N, K/group] of every fully connected node with integer weights, in call order."""
    plan = file.program.execution_plan[0]
    for instruction in plan.chains[0].instructions:
        if type(instruction.instr_args).__name__ == "DelegateCall":
            reference = plan.delegates[instruction.instr_args.delegate_index].processed
            graph = xnnpack_graph(file.segments[reference.index])
            values = {tensor_value(value)["id_out"]: value for value in graph["xvalues"]}
            for node in graph["xnodes"]:
                if node["xnode_union_type"] == "XNNFullyConnected":
                    weight = values[node["xnode_union"]["filter_id"]]
                    if weight["xvalue_union_type"] == "XNNQuantizedTensorValue":
                        yield _decode(file, graph["constant_data"], weight["xvalue_union"])


def xnnpack_graph(blob: Bytes) -> Any:
    """A delegate's graph as JSON, through the library's own flatc and schema."""
    header = xnnpack.XNNHeader.from_bytes(bytes(blob[: xnnpack.XNNHeader.EXPECTED_LENGTH]))
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(xnnpack.__file__).with_name("schema.fbs"), Path(folder) / "graph.bin"
        binary.write_bytes(blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        return json.loads(_FLOATS.sub(_json_number, (Path(folder) / "graph.json").read_text(encoding="utf-8")))


def _json_number(match: re.Match[str]) -> str:
    """flatc writes `inf`, the bound of a ReLU, where Python's JSON has `Infinity`; strings are left unchanged."""
    return match[0].replace("inf", "Infinity").replace("nan", "NaN") if match[0][0] != '"' else match[0]


def tensor_value(value: Any) -> Any:
    """The tensor part of a plain or quantized value."""
    union = value["xvalue_union"]
    return union.get("tensor_value", union)


def _decode(file: PteFile, constants: Any, weight: Any) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Stored bytes → int8 [N, K], float32 [N, K/group]. int4: two per byte, low nibble first, offset by 8."""
    tensor, quantization = weight["tensor_value"], weight["quant_params"]
    rows, columns = tensor["dims"]
    raw = np.frombuffer(file.named(constants[tensor["constant_buffer_idx"]]["named_key"]), np.uint8)
    scale_bytes = file.named(constants[quantization["scale_buffer_idx"]]["named_key"])
    if tensor["datatype"] == "xnn_datatype_qcint8":
        return raw.view(np.int8).reshape(rows, columns), np.frombuffer(scale_bytes, np.float32).reshape(rows, 1)
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).astype(np.int8) - 8
    if tensor["datatype"] == "xnn_datatype_qcint4":
        return nibbles.reshape(rows, columns), np.frombuffer(scale_bytes, np.float32).reshape(rows, 1)
    bf16 = np.frombuffer(scale_bytes, np.uint16).astype(np.uint32) << 16
    return nibbles.reshape(rows, columns), bf16.view(np.float32).reshape(rows, -1)


# ── a tied table, stored once ───────────────────────────────────────────────────────────────────────────────────────
# The delegate finds its weights as named data, a name that points at a segment of the file; the embedding's table lies
# in the constant segment. The head's name is pointed there and the copy dropped, which changes offsets in the
# flatbuffer (schema/program.fbs, `DataSegment.offset`) and in the header. Loaders address segments by offset and size,
# so they need no change.


def share_tied_table(path: Path) -> int:
    """Remove the duplicate table from the file. Returns the bytes saved, 0 if there is no duplicate.

    Only the program is read whole; weights are compared and moved in pieces.
    """
    _patch_generated_flatbuffer_aliases()  # until then the generated modules refer to each other by wrong names
    with path.open("r+b") as file:
        header = _get_extended_header(file.read(64))
        assert header is not None
        file.seek(0)
        head = bytearray(file.read(header.segment_base_offset))
        program = Program.GetRootAs(head, 0)
        duplicate = _duplicate(file, header.segment_base_offset, program)
        if duplicate is None:
            return 0
        index, inside = duplicate
        begin, end = _cut(head, header, program, index, inside)
        file.seek(0)
        file.write(head)
        _move_down(file, header.segment_base_offset + end, header.segment_base_offset + begin)
    return end - begin


def _duplicate(file: BinaryIO, base: int, program: Program) -> tuple[int, int] | None:
    """Index of the named segment whose bytes are in the constant segment, too, and their offset there."""
    table = program.ConstantSegment()
    constants = program.Segments(table.SegmentIndex())
    for entry in range(program.NamedDataLength()):
        index = program.NamedData(entry).SegmentIndex()
        segment = program.Segments(index)
        if segment.Size() < _SMALLEST:
            continue
        for i in range(table.OffsetsLength()):
            start = constants.Offset() + table.Offsets(i)
            inside = start + segment.Size() <= constants.Offset() + constants.Size()
            if inside and _same_bytes(file, base + segment.Offset(), base + start, segment.Size()):
                return index, start
    return None


def _same_bytes(file: BinaryIO, a: int, b: int, size: int) -> bool:
    """Whether the ranges of a file that start at `a` and `b` are equal, up to the first different piece."""
    for done in range(0, size, _PIECE):
        count = min(_PIECE, size - done)
        if os.pread(file.fileno(), count, a + done) != os.pread(file.fileno(), count, b + done):
            return False
    return True


def _cut(head: bytearray, header: _ExtendedHeader, program: Program, index: int, inside: int) -> tuple[int, int]:
    """Point a segment at `inside` and later ones at their new places. Returns the range to drop, padding included."""
    segments = [program.Segments(i) for i in range(program.SegmentsLength())]
    begin = segments[index].Offset()
    later = [segment for segment in segments if segment.Offset() > begin]
    end = min((segment.Offset() for segment in later), default=header.segment_data_size)
    for segment in later:
        _set_offset(head, segment, segment.Offset() - (end - begin))
    _set_offset(head, segments[index], inside)
    resized = _ExtendedHeader(
        program_size=header.program_size,
        segment_base_offset=header.segment_base_offset,
        segment_data_size=header.segment_data_size - (end - begin),
    ).to_bytes()
    head[_HEADER_AT : _HEADER_AT + len(resized)] = resized
    return int(begin), int(end)


def _move_down(file: BinaryIO, source: int, target: int) -> None:
    """Move everything from `source` on to `target`, which precedes it, and cut the file after it."""
    file.flush()
    while piece := os.pread(file.fileno(), _PIECE, source):
        os.pwrite(file.fileno(), piece, target)
        source, target = source + len(piece), target + len(piece)
    file.truncate(target)


def _set_offset(data: bytearray, segment: DataSegment, offset: int) -> None:
    """Overwrite the offset field of one segment in place."""
    field = segment._tab.Offset(4)
    if field == 0:
        raise ExportError("the tied table stands first in the .pte file and cannot be moved; please report this")
    struct.pack_into("<Q", data, segment._tab.Pos + field, offset)
