"""Stores a tied int8 table once in a finished `.pte`: the head's bytes become a view into the embedding's.

The delegate finds its weights as named data, a name that points at a segment of the file; the embedding's table lies
in the constant segment. Pointing the name there changes two numbers in the flatbuffer (schema/program.fbs,
`DataSegment.offset` and `size`) and drops the copy. Loaders address segments by offset and size, so to them nothing
changed.
"""

import struct
from pathlib import Path

from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
from executorch.exir._serialize._program import _ExtendedHeader, _get_extended_header
from executorch.exir._serialize.generated.executorch_flatbuffer.DataSegment import DataSegment
from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program

from ...errors import ExportError

SMALLEST = 64 * 1024
HEADER_AT = 8


def share_tied_table(path: Path) -> int:
    """Rewrite the file with the duplicate table dropped. Returns the bytes saved; 0 when there is no duplicate."""
    _patch_generated_flatbuffer_aliases()  # the generated modules name each other wrongly until this ran
    data = bytearray(path.read_bytes())
    header = _get_extended_header(bytes(data[:64]))
    assert header is not None
    program = Program.GetRootAs(data, 0)
    found = duplicate(data, header.segment_base_offset, program)
    if found is None:
        return 0
    index, inside = found
    saved = drop_segment(data, header, program, index, inside)
    path.write_bytes(data)
    return saved


def duplicate(data: bytearray, base: int, program: Program) -> tuple[int, int] | None:
    """The named segment whose bytes also stand in the constant segment, and where they stand there."""
    where = program.ConstantSegment()
    constants = program.Segments(where.SegmentIndex())
    view = memoryview(data)
    for entry in range(program.NamedDataLength()):
        index = program.NamedData(entry).SegmentIndex()
        segment = program.Segments(index)
        if segment.Size() < SMALLEST:
            continue
        content = view[base + segment.Offset() :][: segment.Size()]
        for i in range(where.OffsetsLength()):
            start = constants.Offset() + where.Offsets(i)
            end = start + segment.Size()
            if end <= constants.Offset() + constants.Size() and view[base + start : base + end] == content:
                return index, start
    return None


def drop_segment(data: bytearray, header: _ExtendedHeader, program: Program, index: int, inside: int) -> int:
    """Cut a segment's bytes (and its padding) out, move the later ones down, point it at `inside`."""
    segments = [program.Segments(i) for i in range(program.SegmentsLength())]
    begin = segments[index].Offset()
    later = [segment for segment in segments if segment.Offset() > begin]
    end = min((segment.Offset() for segment in later), default=header.segment_data_size)
    for segment in later:
        set_offset(data, segment, segment.Offset() - (end - begin))
    set_offset(data, segments[index], inside)
    resized = _ExtendedHeader(
        program_size=header.program_size,
        segment_base_offset=header.segment_base_offset,
        segment_data_size=header.segment_data_size - (end - begin),
    ).to_bytes()
    data[HEADER_AT : HEADER_AT + len(resized)] = resized
    del data[header.segment_base_offset + begin : header.segment_base_offset + end]
    return int(end - begin)


def set_offset(data: bytearray, segment: DataSegment, offset: int) -> None:
    """Overwrite the offset field of one segment in place."""
    field = segment._tab.Offset(4)
    if field == 0:
        raise ExportError("the tied table stands first in the .pte file and cannot be moved; please report this")
    struct.pack_into("<Q", data, segment._tab.Pos + field, offset)
