"""How close each artifact's logits are to the fp32 model, through the runtime that is timed.

Prefill, then teacher-forced decode, over the windows of an evaluation.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export import manifest
from export.checkpoints import tokenizer
from export.errors import ExportError
from export.host.console import stage
from export.manifest import ROOT, Manifest
from export.plan import QuantRecipe, load_named
from runtime_tests import evaluation
from runtime_tests.checks import files
from runtime_tests.checks.accuracy import compare, not_finite
from runtime_tests.evaluation import Windows
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import BenchLogitsJob, Opening, ReferenceJob, ReferenceTask, isolation
from runtime_tests.jobs.isolation import Ended

from .exports import BENCH
from .results import Fidelity

_LIMIT_S = 1800.0
CANDIDATE = "candidate.npy"
"""The logits of the artifact that was judged last."""
_NO_LOGITS = "llm_runner"
"""The runner that gives text only; the runner `pte` gives the logits of the same file."""


def windows(folder: Path, eval_name: str) -> Windows:
    """Token windows of an evaluation for one of our artifacts."""
    return evaluation.cut_windows(evaluation.load(eval_name), tokenizer.load(folder), manifest.read(folder))


def refuse_read_text(eval_name: str, recipes: Sequence[str]) -> None:
    """Raises ExportError where a recipe was calibrated on the evaluation's text."""
    judged = evaluation.load(eval_name)
    for name in recipes:
        if problems := files.contamination(judged, load_named(QuantRecipe, "quant", name)):
            raise ExportError(problems[0])


def judge(openings: Mapping[str, Opening], folder: Path, source: str | None, cut: Windows) -> list[Fidelity]:
    """Every contender that gives logits, by name, against the fp32 model of the checkpoint behind `folder`."""
    described, threads = manifest.read(folder), next(iter(openings.values())).threads
    with tempfile.TemporaryDirectory(prefix=".logits-", dir=ROOT / BENCH) as scratch:
        compute_reference(folder, source, cut, Path(scratch), threads)
        return [
            judge_one(name, opening, described, cut, Path(scratch))
            for name, opening in openings.items()
            if opening.runner != _NO_LOGITS
        ]


def compute_reference(folder: Path, source: str | None, cut: Windows, room: Path, threads: int) -> NDArray[np.float32]:
    """The fp32 model's logits; they stay in `room`, where `judge_one` reads them. Raises ExportError."""
    room.mkdir(exist_ok=True)
    np.save(room / "tokens.npy", cut.tokens)
    task = ReferenceTask(
        kind="fp32", tokens=str(room / "tokens.npy"), prefill=cut.prefill, out=str(room / "reference.npy")
    )
    job = ReferenceJob(
        folder=str(folder), source=source, cache=str(ROOT / "build" / "cache"), threads=threads, tasks=(task,)
    )
    with stage("reference", source or "fp32 logits"):
        ended = isolation.run(job, limit_s=_LIMIT_S)
    if ended.outcome is not Outcome.PASS:
        raise ExportError(f"fp32 reference: {ended.outcome.value}: {ended.detail}")
    return load(room / "reference.npy")


def judge_one(name: str, opening: Opening, described: Manifest, cut: Windows, room: Path) -> Fidelity:
    """Logits of one artifact, compared with those of the reference in `room`; a crash is a result."""
    job = BenchLogitsJob(
        opening=opening,
        vocab_size=described.architecture.vocab_size,
        tokens=str(room / "tokens.npy"),
        prefill=cut.prefill,
        out=str(room / CANDIDATE),
    )
    with stage("accuracy", name):
        ended = isolation.run(job, limit_s=_LIMIT_S)
    if ended.outcome is not Outcome.PASS:
        return _failed(name, ended)
    candidate = load(room / CANDIDATE)
    if problem := not_finite(candidate):
        return _failed(name, Ended(Outcome.MISMATCH, problem))
    comparison = compare(load(room / "reference.npy"), candidate, cut.targets, cut.labels)
    numbers = comparison.model_dump(include=set(Fidelity.model_fields))
    return Fidelity(contender=name, outcome=Outcome.PASS, detail="", **numbers)


def load(path: Path) -> NDArray[np.float32]:
    """Logits [W, decode + 1, V], read from the file as they are used."""
    logits: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return logits


def _failed(name: str, ended: Ended) -> Fidelity:
    numbers = dict.fromkeys(("mean_kl", "p99_kl", "top1", "perplexity", "reference_perplexity"), 0.0)
    return Fidelity(contender=name, outcome=ended.outcome, detail=ended.detail, positions=0, by_domain={}, **numbers)
