"""Core ML: the saved package in the evaluator, which gives values of each layer as more outputs."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.architecture import EMBEDDING, ROTATE_IN
from export.errors import ExportError
from export.formats.mlpackage import mil_name
from export.manifest import Manifest
from runtime_tests.coreml.package import Operation, load
from runtime_tests.sessions.mlpackage import Evaluated, PackageSession

from . import points
from .points import Points, Probe

NOTE = "read in the evaluator of the saved package, on a Mac too; it rounds as Core ML does on CPU and GPU"
LIMITS = dict.fromkeys(points.KINDS, 40.0)


class _Kept:
    """A model that keeps what its last call gave."""

    def __init__(self, model: Evaluated) -> None:
        self.model = model
        self.outputs: dict[str, NDArray[Any]] = {}
        self.make_state = model.make_state

    def predict(self, inputs: dict[str, NDArray[Any]], state: Any) -> dict[str, NDArray[Any]]:
        self.outputs = self.model.predict(inputs, state)
        return self.outputs


def open_probe(folder: Path, described: Manifest, threads: int) -> Probe:
    """The artifact in the evaluator. Raises ExportError: its program has not the values of our layers."""
    package = folder / described.plan.target.artifact
    places = _places(package, described)
    kept = _Kept(Evaluated(package, threads, tuple(places.values())))
    session = PackageSession(kept, described.contract, measures_speed=False)

    def step(tokens: Sequence[int], position: int) -> Points:
        session.step(tokens, position)
        return {place: kept.outputs[name][0].astype(np.float32) for place, name in places.items()}

    def probe(calls: Sequence[Sequence[int]]) -> Points:
        session.reset()
        starts = accumulate((len(tokens) for tokens in calls), initial=0)
        return points.joined([step(tokens, start) for tokens, start in zip(calls, starts, strict=False)])

    return probe


def _places(package: Path, described: Manifest) -> dict[str, str]:
    """Names of variables by place: what o_proj is given, and the sums that o_proj's and down_proj's outputs go into."""
    operations = load(package).operations
    named = {op.name: op for op in operations if op.kind in ("linear", "gather")}
    sums = {str(part): op for op in operations if op.kind == "add" for part in op.inputs["y"]}

    def linear(name: str) -> Operation:
        if mil_name((name,)) not in named:
            raise ExportError(f"{package}: no operation {mil_name((name,))!r} in its program; build the artifact again")
        return named[mil_name((name,))]

    a = described.architecture
    places = {points.EMBEDDING: _output(linear(EMBEDDING))}
    if a.rotated:
        places[points.ROTATION] = _output(linear(ROTATE_IN))
    for i in range(a.num_hidden_layers):
        o, down = (linear(f"model.layers.{i}.{name}.weight") for name in ("self_attn.o_proj", "mlp.down_proj"))
        places[points.attention(i)] = str(o.inputs["x"][0])
        places[points.o_proj(i)] = _output(sums[_output(o)])
        places[points.mlp(i)] = _output(sums[_output(down)])
    return places | {points.LOGITS: described.contract.outputs[0].name}


def _output(op: Operation) -> str:
    return op.outputs[0][0]
