"""A trace: a child process compares an artifact's parts, and here they are judged."""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from devices import Device
from export import manifest
from export.architecture import Strict
from export.checkpoints import tokenizer
from export.errors import ExportError
from export.formats import admission
from export.host import mkl
from export.host.console import stage
from export.manifest import Manifest
from export.quantization.eager import eager
from runtime_tests import evaluation, sessions
from runtime_tests.checks.accuracy import sqnr_by_window
from runtime_tests.checks.weights import rebuild
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import TraceJob, isolation
from runtime_tests.places import environment

from . import comparison, points
from .comparison import Part
from .points import Probe

TOKENS = 16
"""Of the prompt: the beginning of the evaluation's first window."""
ONE_CALL, SINGLE = "prompt in one call", "token by token"


class _Format(Protocol):
    NOTE: str
    """How its values are read, in words."""
    LIMITS: dict[str, float]
    """By kind of part, dB: what no rounding of its runtime comes down to."""

    def open_probe(self, folder: Path, described: Manifest, threads: int) -> Probe:
        """The artifact, to be read. Raises ExportError: it has not the parts of our layers."""


class Trace(Strict):
    """The parts of one artifact, fed in one call and token by token."""

    artifact: str
    note: str
    limits: dict[str, float]
    tokens: tuple[int, ...]
    parts: dict[str, tuple[Part, ...]]
    plain_sqnr_db: float
    """Last logits of the probe beside those of the artifact's own session; 200: the same."""

    @property
    def first(self) -> tuple[str, Part] | None:
        """The first part that breaks in the order of computation, and in which way of feeding."""
        for pair in zip(*self.parts.values(), strict=True):
            for way, part in zip(self.parts, pair, strict=True):
                if self.breaks(part):
                    return way, part
        return None

    def breaks(self, part: Part) -> bool:
        """Whether a part alone is under its limit."""
        return part.alone < self.limit(part)

    def limit(self, part: Part) -> float:
        """The lowest of its kinds."""
        return min(self.limits[kind] for kind in part.name.split("+"))


def trace(folder: Path, device: Device, source: str | None, cache: Path) -> Trace:
    """An artifact's trace on this machine. Raises ExportError."""
    described = admission.admit(folder)
    _format(described)
    tokenizer.try_out(folder / "tokenizer.json")
    windows = evaluation.cut_windows(evaluation.load(device.evaluation), tokenizer.load(folder), described)
    job = TraceJob(
        folder=str(folder.resolve()),
        source=source,
        cache=str(cache.resolve()),
        threads=environment.threads(device),
        tokens=tuple(windows.tokens[0, :TOKENS].tolist()),
    )
    with stage("trace", described.id):
        ended = isolation.run(job, limit_s=device.time_limit_s)
    if ended.outcome is not Outcome.PASS:
        raise ExportError(f"{folder}: {ended.outcome.value}: {ended.detail}")
    return Trace.model_validate(ended.result)


def compute(job: TraceJob) -> dict[str, Any]:
    """The trace, in a child process. Raises SourceError, and whatever the runtime raises."""
    folder, tokens = Path(job.folder), list(job.tokens)
    described = manifest.read(folder)
    module = _format(described)
    probe = module.open_probe(folder, described, job.threads)
    ways = {ONE_CALL: [tokens], SINGLE: [[token] for token in tokens]}
    read = {way: probe(calls) for way, calls in ways.items()}
    del probe
    session = sessions.open_session(folder, described, threads=job.threads)
    pair = (values[None, None] for values in (session.feed(tokens), read[ONE_CALL][points.LOGITS][-1]))
    plain = sqnr_by_window(*(np.asarray(values, np.float32) for values in pair))[0]
    session.close()
    mkl.settle()
    torch.set_num_threads(job.threads)
    model = rebuild(described, job.source, Path(job.cache))
    llama = eager(model.read, model.architecture, described.plan.target.activations, described.plan.window)
    return Trace(
        artifact=described.id,
        note=module.NOTE,
        limits=module.LIMITS,
        tokens=job.tokens,
        parts={way: tuple(comparison.compare(llama, tokens, values)) for way, values in read.items()},
        plain_sqnr_db=plain,
    ).model_dump()


def _format(described: Manifest) -> _Format:
    """The module that reads an artifact of this format. Raises ExportError where there is none."""
    name = sessions.require(described.plan.target.session)
    if find_spec(f"{__package__}.{name}") is None:
        raise ExportError(
            f"{described.id}: layers of {name} are not traced; `python -m runtime_tests` compares its logits"
        )
    return cast(_Format, importlib.import_module(f"{__package__}.{name}"))
