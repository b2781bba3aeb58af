"""How close each artifact's logits are to the fp32 model, through the runtime that was timed.

Knows nothing about timing. Prefill, then teacher-forced decode, over the windows of an evaluation.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export import manifest, tokenizer
from export.errors import ExportError
from export.manifest import ROOT, Manifest
from export.plan import QuantRecipe, load_named
from export.progress import stage

from .. import contamination, evaluation, isolation
from ..accuracy import compare, not_finite
from ..evaluation import Windows
from ..isolation import Ended
from ..jobs import BenchLogitsJob, Opening, ReferenceJob, ReferenceTask
from ..record import Comparison, Outcome
from .contenders import Contender
from .results import Fidelity
from .stock import BENCH

LIMIT_S = 1800.0
NO_LOGITS = "llm_runner"
"""The runner that gives text only; its file is judged through the other one."""


def windows(folder: Path, eval_name: str) -> Windows:
    """Token windows of an evaluation for one of our artifacts."""
    return evaluation.cut_windows(evaluation.load(eval_name), tokenizer.load(folder), manifest.read(folder))


def refuse_read_text(eval_name: str, recipes: Sequence[str]) -> None:
    """No recipe may have calibrated on the evaluation's text. Raises ExportError."""
    judged = evaluation.load(eval_name)
    for name in recipes:
        if found := contamination.problems(judged, load_named(QuantRecipe, "quant", name)):
            raise ExportError(found[0])


def judge(contenders: Sequence[Contender], folder: Path, source: str | None, cut: Windows) -> list[Fidelity]:
    """Every contender that gives logits against the fp32 model of `folder`'s checkpoint."""
    described = manifest.read(folder)
    found = []
    with tempfile.TemporaryDirectory(prefix=".logits-", dir=ROOT / BENCH) as scratch:
        room = Path(scratch)
        np.save(room / "tokens.npy", cut.tokens)
        with stage("reference", "fp32 logits"):
            compute_reference(folder, source, cut, room, threads=contenders[0].opening.threads)
        for contender in contenders:
            if contender.opening.runner != NO_LOGITS:
                with stage("accuracy", contender.entry.name):
                    found.append(judge_one(contender.entry.name, contender.opening, described, cut, room))
    return found


def compute_reference(folder: Path, source: str | None, cut: Windows, room: Path, *, threads: int) -> None:
    """Write the fp32 model's logits."""
    task = ReferenceTask(
        kind="fp32", tokens=str(room / "tokens.npy"), prefill=cut.prefill, out=str(room / "reference.npy")
    )
    job = ReferenceJob(
        folder=str(folder), source=source, cache=str(ROOT / "build" / "cache"), threads=threads, tasks=(task,)
    )
    ended = isolation.run(job, limit_s=LIMIT_S)
    if ended.outcome is not Outcome.PASS:
        raise ExportError(f"fp32 reference: {ended.outcome.value}: {ended.detail}")


def judge_one(name: str, opening: Opening, described: Manifest, cut: Windows, room: Path) -> Fidelity:
    """Logits of one opened artifact, compared; a crash is a result."""
    out = room / "candidate.npy"
    job = BenchLogitsJob(
        opening=opening,
        vocab_size=described.architecture.vocab_size,
        tokens=str(room / "tokens.npy"),
        prefill=cut.prefill,
        out=str(out),
    )
    ended = isolation.run(job, limit_s=LIMIT_S)
    if ended.outcome is not Outcome.PASS:
        return failed(name, ended)
    reference, candidate = (np.load(path, mmap_mode="r") for path in (room / "reference.npy", out))
    if problem := not_finite(candidate):
        return failed(name, Ended(Outcome.MISMATCH, problem))
    return passed(name, compare(reference, candidate, cut.targets, cut.labels))


def passed(name: str, measured: Comparison) -> Fidelity:
    """The numbers a reader of a benchmark needs."""
    return Fidelity(
        contender=name,
        outcome=Outcome.PASS,
        detail="",
        positions=measured.positions,
        mean_kl=measured.mean_kl,
        p99_kl=measured.p99_kl,
        top1=measured.top1,
        perplexity=measured.perplexity,
        reference_perplexity=measured.reference_perplexity,
        by_domain=measured.by_domain,
    )


def failed(name: str, ended: Ended) -> Fidelity:
    """No numbers, but a reason."""
    return Fidelity(
        contender=name,
        outcome=ended.outcome,
        detail=ended.detail,
        positions=0,
        mean_kl=0.0,
        p99_kl=0.0,
        top1=0.0,
        perplexity=0.0,
        reference_perplexity=0.0,
        by_domain={},
    )
