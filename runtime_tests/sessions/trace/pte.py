"""ExecuTorch: the shipped program under its developer tools, which log what every operator and delegate call gave.

A layer is two calls of XNNPACK with attention between them. Logged are attention, and the residual stream as an
argument of the call before it; o_proj and MLP are inside one call, in the last layer with the head, and are compared
together.
"""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

# custom_sdpa, update_cache and the quantized embedding live in libraries these imports load
import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401
import numpy as np
import torch
from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc
from executorch.extension.pybindings.portable_lib import _load_for_executorch, _unsafe_reset_threadpool

from export.architecture import Architecture
from export.errors import ExportError
from export.manifest import Manifest

from . import points
from .points import Points, Probe

NOTE = "as ExecuTorch's developer tools log it; o_proj and MLP are one delegate, in the last layer with the head"
LIMITS = dict.fromkeys(points.KINDS, 40.0)
_ATTENTION = "_sdpa"
_BYTES = {6: 4, 15: 2}
"""Of a number, by ExecuTorch's scalar types: float32, bfloat16."""
_COPIES = 24
"""Values of the size of the residual stream that a layer logs, at most."""


def open_probe(folder: Path, described: Manifest, threads: int) -> Probe:
    """The artifact in ExecuTorch's Python runtime."""
    path, a = folder / described.plan.target.artifact, described.architecture
    torch.set_num_threads(threads)
    _unsafe_reset_threadpool(threads)

    def probe(calls: Sequence[Sequence[int]]) -> Points:
        room = 2**24 + sum(_logged_bytes(a, len(tokens)) for tokens in calls)
        module = _load_for_executorch(str(path), enable_etdump=True, debug_buffer_size=room)
        starts = accumulate((len(tokens) for tokens in calls), initial=0)
        for tokens, start in zip(calls, starts, strict=False):
            module.forward([torch.tensor([tokens]), torch.tensor([start])])
        with tempfile.TemporaryDirectory() as scratch:
            dump, values = Path(scratch) / "dump", Path(scratch) / "values"
            module.write_etdump_result_to_file(str(dump), str(values))
            log, data = deserialize_from_etdump_flatcc(dump.read_bytes()), np.fromfile(values, np.uint8)
        runs = [run for run in log.run_data if any(event.debug_event for event in run.events)]
        return points.joined(
            [_points(run.events, data, a, len(fed), str(path)) for run, fed in zip(runs, calls, strict=True)]
        )

    return probe


def _logged_bytes(a: Architecture, tokens: int) -> int:
    widest = max(a.hidden_size, a.num_attention_heads * a.head_dim)
    return 4 * (_COPIES * tokens * widest * a.num_hidden_layers + 4 * a.vocab_size)


def _points(events: Sequence[Any], data: Any, a: Architecture, tokens: int, path: str) -> Points:
    """Of one call: before each attention the last value that has the residual stream's shape."""
    attentions = {
        event.profile_event.instruction_id
        for event in events
        if event.profile_event and event.profile_event.name and _ATTENTION in event.profile_event.name
    }
    read: Points = {}
    stream, layer = None, 0
    for instruction, value in _floats(events, data):
        if instruction in attentions:
            if stream is None:
                break
            begins = points.ROTATION if a.rotated else points.EMBEDDING
            read[points.mlp(layer - 1) if layer else begins] = stream
            read[points.attention(layer)] = value.reshape(-1, a.num_attention_heads * a.head_dim)
            stream, layer = None, layer + 1
        elif value.shape == (1, tokens, a.hidden_size):
            stream = value[0]
    if layer != a.num_hidden_layers:
        raise ExportError(f"{path}: its operators are not those of {a.num_hidden_layers} layers; build it again")
    return read | {points.LOGITS: value.reshape(-1, a.vocab_size)}


def _floats(events: Sequence[Any], data: Any) -> Iterator[tuple[int, Any]]:
    """Logged float32 and bfloat16 tensors in order, each with its instruction's number; the last are the logits."""
    for event in events:
        logged = event.debug_event and event.debug_event.debug_entry.tensor
        if logged and logged.scalar_type in _BYTES:
            width = _BYTES[logged.scalar_type]
            stored = data[logged.offset : logged.offset + width * int(np.prod(logged.sizes))]
            bits = stored.view(f"u{width}").astype(np.uint32) << (8 * (4 - width))
            yield event.debug_event.instruction_id, bits.view(np.float32).reshape(logged.sizes)
