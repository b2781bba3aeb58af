"""Stores a tied int8 table once in a finished `.pte`: the head's bytes become a view into the embedding's.

The delegate finds its weights as named data, a name that points at a segment of the file; the embedding's table lies
in the constant segment. Pointing the name there changes two numbers in the flatbuffer (schema/program.fbs,
`DataSegment.offset` and `size`) and drops the copy. Loaders address segments by offset and size, so to them nothing
changed.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
from executorch.exir._serialize._program import _ExtendedHeader, _get_extended_header
from executorch.exir._serialize.generated.executorch_flatbuffer.DataSegment import DataSegment
from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program

from ...errors import ExportError

SMALLEST = 64 * 1024
HEADER_AT = 8
PIECE = 2**22
"""Bytes compared or moved at a time."""


def share_tied_table(path: Path) -> int:
    """Rewrite the file with the duplicate table dropped. Returns the bytes saved; 0 when there is no duplicate.

    Only the program is read whole; weights are compared and moved in pieces.
    """
    _patch_generated_flatbuffer_aliases()  # the generated modules name each other wrongly until this ran
    with path.open("r+b") as file:
        header = _get_extended_header(file.read(64))
        assert header is not None
        file.seek(0)
        head = bytearray(file.read(header.segment_base_offset))
        program = Program.GetRootAs(head, 0)
        found = duplicate(file, header.segment_base_offset, program)
        if found is None:
            return 0
        index, inside = found
        begin, end = cut(head, header, program, index, inside)
        file.seek(0)
        file.write(head)
        move_down(file, header.segment_base_offset + end, header.segment_base_offset + begin)
    return end - begin


def duplicate(file: BinaryIO, base: int, program: Program) -> tuple[int, int] | None:
    """The named segment whose bytes also stand in the constant segment, and where they stand there."""
    where = program.ConstantSegment()
    constants = program.Segments(where.SegmentIndex())
    for entry in range(program.NamedDataLength()):
        index = program.NamedData(entry).SegmentIndex()
        segment = program.Segments(index)
        if segment.Size() < SMALLEST:
            continue
        for i in range(where.OffsetsLength()):
            start = constants.Offset() + where.Offsets(i)
            inside = start + segment.Size() <= constants.Offset() + constants.Size()
            if inside and same_bytes(file, base + segment.Offset(), base + start, segment.Size()):
                return index, start
    return None


def same_bytes(file: BinaryIO, one: int, other: int, size: int) -> bool:
    """Whether two ranges of a file hold the same; the first difference ends the search."""
    for done in range(0, size, PIECE):
        count = min(PIECE, size - done)
        if os.pread(file.fileno(), count, one + done) != os.pread(file.fileno(), count, other + done):
            return False
    return True


def cut(head: bytearray, header: _ExtendedHeader, program: Program, index: int, inside: int) -> tuple[int, int]:
    """Point a segment at `inside` and later ones at where they move; what is to be dropped, with its padding."""
    segments = [program.Segments(i) for i in range(program.SegmentsLength())]
    begin = segments[index].Offset()
    later = [segment for segment in segments if segment.Offset() > begin]
    end = min((segment.Offset() for segment in later), default=header.segment_data_size)
    for segment in later:
        set_offset(head, segment, segment.Offset() - (end - begin))
    set_offset(head, segments[index], inside)
    resized = _ExtendedHeader(
        program_size=header.program_size,
        segment_base_offset=header.segment_base_offset,
        segment_data_size=header.segment_data_size - (end - begin),
    ).to_bytes()
    head[HEADER_AT : HEADER_AT + len(resized)] = resized
    return int(begin), int(end)


def move_down(file: BinaryIO, source: int, target: int) -> None:
    """Everything from `source` on moves to `target`, which comes before it; the file ends there."""
    file.flush()
    while piece := os.pread(file.fileno(), PIECE, source):
        os.pwrite(file.fileno(), piece, target)
        source, target = source + len(piece), target + len(piece)
    file.truncate(target)


def set_offset(data: bytearray, segment: DataSegment, offset: int) -> None:
    """Overwrite the offset field of one segment in place."""
    field = segment._tab.Offset(4)
    if field == 0:
        raise ExportError("the tied table stands first in the .pte file and cannot be moved; please report this")
    struct.pack_into("<Q", data, segment._tab.Pos + field, offset)
