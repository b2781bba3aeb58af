"""ONNX: the shipped graph in memory with the values of each layer as more outputs; its weights stay in their file."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from export.architecture import FINAL_NORM, ROTATE_IN
from export.errors import ExportError
from export.manifest import Manifest
from runtime_tests.sessions.onnx_kv import options_of

from . import points
from .points import Points, Probe

NOTE = "read as more outputs of the shipped graph; onnxruntime fuses nothing across them"
LIMITS = {"embedding": 60.0, "rotation": 25.0, "attention": 15.0, "o_proj": 28.0, "mlp": 25.0, "logits": 25.0}
_FOLDER = "session.model_external_initializers_file_folder_path"


def open_probe(folder: Path, described: Manifest, threads: int) -> Probe:
    """The artifact in onnxruntime."""
    path = folder / described.plan.target.artifact
    proto = onnx.load(path, load_external_data=False)
    places = _places(described, proto)
    known = {output for node in proto.graph.node for output in node.output}
    if missing := set(places.values()) - known:
        raise ExportError(f"{path}: no value {min(missing)!r} in its graph; build the artifact again")
    proto.graph.output.extend(onnx.ValueInfoProto(name=value) for value in places.values())
    options = options_of(path, threads)
    options.add_session_config_entry(_FOLDER, str(folder.resolve()))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ids, mask, *pasts = (spec.name for spec in described.contract.inputs)
    logits, *presents = (spec.name for spec in described.contract.outputs)
    kv = described.contract.kv
    cache = dict.fromkeys(pasts, np.zeros((1, kv.kv_heads, kv.slots or 0, kv.head_dim), kv.dtype))

    def step(tokens: Sequence[int], position: int) -> Points:
        fed = {ids: np.array([tokens], np.int64), mask: np.ones((1, position + len(tokens)), np.int64)}
        fed |= {name: slots if kv.slots else slots[:, :, :position] for name, slots in cache.items()}
        given = session.run([logits, *presents, *places.values()], fed)
        cache.update(zip(pasts, given[1:], strict=False))
        rows = [value[0] for value in (*given[1 + len(presents) :], given[0])]
        return dict(zip((*places, points.LOGITS), rows, strict=True))

    def probe(calls: Sequence[Sequence[int]]) -> Points:
        starts = accumulate((len(tokens) for tokens in calls), initial=0)
        return points.joined([step(tokens, start) for tokens, start in zip(calls, starts, strict=False)])

    return probe


def _places(described: Manifest, proto: onnx.ModelProto) -> dict[str, str]:
    """Names of values by place; the last residual sum, which nothing in the file reads, gets its name here."""
    a = described.architecture
    last = f"{FINAL_NORM}.sum"
    for node in proto.graph.node:
        if node.output[0] == f"{FINAL_NORM}.out":
            del node.output[1:]
            node.output.extend(["", "", last])
    norms = a.norm_names()
    places = {points.EMBEDDING: "embedded"} | ({points.ROTATION: f"{ROTATE_IN}.out"} if a.rotated else {})
    for i in range(a.num_hidden_layers):
        places[points.attention(i)] = f"model.layers.{i}.self_attn.out"
        places[points.o_proj(i)] = f"{norms[2 * i + 1]}.sum"
        places[points.mlp(i)] = f"{norms[2 * i + 2]}.sum"
    return places
