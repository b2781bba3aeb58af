"""Writes the `.pte`: traced, delegated to XNNPACK, emitted, and a tied int8 table stored once in the finished file.

The delegate finds its weights as named data, a name that points at a segment of the file; the embedding's table lies
in the constant segment. `_share_tied_table` points the head's name there and drops the copy, which changes offsets in
the flatbuffer (schema/program.fbs, `DataSegment.offset`) and in the header. Loaders address segments by offset and
size, so they need no change.
"""

import logging
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import executorch.exir.passes._quant_patterns_and_replacements
import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  (registers llama::update_cache and custom_sdpa)
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
from executorch.exir._serialize._program import _ExtendedHeader, _get_extended_header
from executorch.exir._serialize.generated.executorch_flatbuffer.DataSegment import DataSegment
from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program
from executorch.exir.backend.canonical_partitioners.config_partitioner import DSJ
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch.export import Dim, ExportedProgram

from export.errors import ExportError
from export.formats import Build
from export.manifest import IOContract
from export.quantization.store import QuantizedModel

from . import methods
from .functional_form import functionalize, no_decompositions
from .graph import PteLlama
from .lowering import fast_lowering, replaced

_Facts = dict[str, int | float | str]
_SMALLEST = 64 * 1024
"""Bytes of the smallest segment that is looked for as a duplicate."""
_HEADER_AT = 8
_PIECE = 2**22
"""Bytes that are compared or moved at a time."""


def write(model: QuantizedModel, build: Build, contract: IOContract) -> _Facts:
    """Write the artifact. Returns counts of delegates and of the ops left outside them."""
    with model.reader() as read:  # one mapping; one for each weight would be 150 GB of address space for 1B
        module = PteLlama(read, model.architecture, contract.kv.context_length).eval()
    with _quiet():
        program = functionalize(trace(module, contract.max_prefill))
    with _quiet(), _ordered_groups(), fast_lowering(), no_decompositions():
        edge = _lower(program, methods(model.architecture, contract, build.tokenizer))
        facts = _count(edge)
        emitted = edge.to_executorch(_backend_config())
    path = build.folder / build.plan.target.artifact
    with path.open("wb") as file:
        emitted.write_to_file(file)
    return {**facts, "tied_table_bytes_saved": _share_tied_table(path)}


def trace(module: PteLlama, max_prefill: int) -> ExportedProgram:
    """The graph for 1…max_prefill tokens at any position."""
    example = (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([5]))
    sequence = Dim("sequence", min=1, max=max_prefill)
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=({1: sequence}, None), strict=False)


def _lower(program: ExportedProgram, constant_methods: dict[str, Any]) -> EdgeProgramManager:
    """Edge dialect, with all that XNNPACK can run in delegates."""
    return to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=constant_methods,
    )


def _backend_config() -> ExecutorchBackendConfig:
    """Inputs stay in the caller's memory; all other memory is planned for the largest shape."""
    return ExecutorchBackendConfig(
        extract_delegate_segments=True,
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
    )


def _count(edge: EdgeProgramManager) -> _Facts:
    names = Counter(
        node.target.__name__ if hasattr(node.target, "__name__") else str(node.target)
        for node in edge.exported_program().graph.nodes
        if node.op == "call_function"
    )
    delegates = names.pop("executorch_call_delegate", 0)
    names.pop("getitem", 0)
    ours = sum(n for name, n in names.items() if "custom_sdpa" in name or "auto_functionalized" in name)
    return {"delegates": delegates, "attention_and_cache_ops": ours, "other_ops": names.total() - ours}


@contextmanager
def _ordered_groups() -> Iterator[None]:
    """Partition groups in graph order: the library holds them in sets of nodes, whose order changes from run to run."""

    def gen_groups(self: Any) -> list[list[torch.fx.Node]]:
        groups: dict[Any, list[torch.fx.Node]] = {}
        for node in self.parent:
            groups.setdefault(self.find(node), []).append(node)
        return list(groups.values())

    with replaced(DSJ, "gen_groups", gen_groups):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of the libraries, which concern what is done here on purpose; errors are still raised."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)


def _share_tied_table(path: Path) -> int:
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
