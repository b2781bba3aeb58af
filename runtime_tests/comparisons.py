"""Three comparisons, one suspect each: rewriting, quantization, lowering. Knows nothing about formats.

Hugging Face fp32 → our fp32 → our quantized model → the artifact; and from the first to the last, which no gate
judges: what the artifact loses as shipped. References are eager PyTorch in a child process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export import cache, tokenizer
from export.errors import ExportError
from export.progress import stage

from . import accuracy, evaluation, gates, jobs, reference
from .case import Case, StoppedError, ask, ask_artifact
from .evaluation import Windows
from .record import Comparison, Outcome

PROBES = 64


@dataclass(frozen=True)
class Tokens:
    """Windows as the child processes find them: a file, and what is in it."""

    windows: Windows
    file: Path

    def task(self, out: Path) -> dict[str, Any]:
        """The fields of a task that feeds these windows."""
        return {"tokens": str(self.file), "prefill": self.windows.prefill, "out": str(out)}


def prepare(case: Case) -> tuple[Tokens, Tokens]:
    """The evaluation's windows, and prompts of one token each."""
    try:
        loaded = tokenizer.load(case.folder)
    except ExportError as error:
        raise StoppedError(Outcome.TOKENIZER_DIFFERS, str(error)) from None
    windows = evaluation.cut_windows(case.setting.evaluation, loaded, case.manifest)
    distinct = np.unique(windows.tokens)
    singles = distinct[:: max(1, len(distinct) // PROBES)][:PROBES]
    probes = Windows(np.stack([singles, singles], axis=1), ("probe",) * len(singles), prefill=1)
    return kept_tokens(case, windows, "windows"), kept_tokens(case, probes, "probes")


def kept_tokens(case: Case, windows: Windows, name: str) -> Tokens:
    """Windows written where child processes find them."""
    file = case.setting.scratch / f"{name}.npy"
    np.save(file, windows.tokens)
    return Tokens(windows, file)


def compute_references(case: Case, windows: Tokens, probes: Tokens) -> dict[str, Path]:
    """Files of every reference this artifact is judged by; those not kept from before are computed in one process."""
    wanted: list[tuple[str, reference.Kind, Tokens]] = [
        ("huggingface", "huggingface", windows),
        ("fp32", "fp32", windows),
        ("quantized", "quantized", windows),
    ]
    if rounds_activations(case):
        wanted.append(("noise", "noise", windows))
    if case.limits.min_probe_sqnr_db is not None:
        wanted.append(("probes", "quantized", probes))
    files = {
        name: reference.locate(kind, case.manifest, tokens.windows.tokens, case.setting.cache)
        for name, kind, tokens in wanted
    }
    missing = [(name, kind, tokens) for name, kind, tokens in wanted if not files[name].is_file()]
    for name in files.keys() - {name for name, _, _ in missing}:
        cache.used(files[name])
    if missing:
        with stage("references", ", ".join(name for name, _, _ in missing)):
            compute_missing(case, files, missing)
    return files


def compute_missing(case: Case, files: dict[str, Path], missing: Sequence[tuple[str, reference.Kind, Tokens]]) -> None:
    """Ask a child process for references and keep them under their final names once they are whole."""
    partial = {name: case.setting.scratch / f"reference-{name}.npy" for name, _, _ in missing}
    tasks = tuple(jobs.ReferenceTask(kind=kind, **tokens.task(partial[name])) for name, kind, tokens in missing)
    job = jobs.ReferenceJob(
        folder=case.folder_text,
        source=case.setting.source,
        cache=case.cache_text,
        threads=case.setting.threads,
        tasks=tasks,
    )
    ask(case, job, "references")
    case.setting.cache.mkdir(parents=True, exist_ok=True)
    for name, file in partial.items():
        file.replace(files[name])


def rounds_activations(case: Case) -> bool:
    """Whether the runtime, and so our reference, rounds activations."""
    plan = case.manifest.plan
    return plan.target.activations != "none" and plan.quant.method != "none"


def compare_references(case: Case, windows: Windows, files: dict[str, Path]) -> None:
    """Hugging Face fp32 → our fp32 → our quantized model, and that model → itself with float noise."""
    with stage("compare", "rewriting and quantization"):
        rewriting = compare(windows, files["huggingface"], files["fp32"])
        quantization = compare(windows, files["fp32"], files["quantized"])
        case.comparisons |= {"rewriting": rewriting, "quantization": quantization}
        if "noise" in files:
            case.comparisons["noise"] = compare(windows, files["quantized"], files["noise"])
    case.gates += gates.rewriting(rewriting, case.setting.evaluation.max_rewriting_error)
    case.gates += gates.quantization(quantization, case.manifest.plan.quant.limits)


def compare_artifact(case: Case, windows: Tokens, probes: Tokens, files: dict[str, Path]) -> None:
    """The artifact in its runtime, with a filled cache: against our quantized model, and all in all.

    For single tokens too, where the target asks for that.
    """
    out, probed = case.setting.scratch / "artifact.npy", case.setting.scratch / "artifact-probes.npy"
    tasks = [jobs.Task(**windows.task(out))]
    if "probes" in files:
        tasks.append(jobs.Task(**probes.task(probed)))
    with stage("artifact", f"{len(windows.windows.tokens)} windows"):
        job = jobs.LogitsJob(folder=case.folder_text, threads=case.setting.place.threads, tasks=tuple(tasks))
        ask_artifact(case, job, "artifact")
    problem = accuracy.not_finite(np.load(out, mmap_mode="r"))
    case.gates.append(gates.count("logits finite: problems", [problem] if problem else [], Outcome.MISMATCH))
    if problem:
        raise StoppedError(Outcome.MISMATCH, problem)
    with stage("compare", "lowering and total"):
        lowering = case.comparisons["lowering"] = compare(windows.windows, files["quantized"], out)
        case.comparisons["total"] = compare(windows.windows, files["huggingface"], out)
    limits = case.limits
    case.gates += gates.lowering(lowering, limits, case.comparisons.get("noise"))
    if limits.min_probe_sqnr_db is not None:
        case.probe_sqnr_db = accuracy.sqnr_by_window(np.load(files["probes"]), np.load(probed))
        case.gates.append(gates.probes(case.probe_sqnr_db, limits.min_probe_sqnr_db))


def compare(windows: Windows, wanted: Path, found: Path) -> Comparison:
    """Compare two files of logits."""
    reference_logits, logits = np.load(wanted, mmap_mode="r"), np.load(found, mmap_mode="r")
    return accuracy.compare(reference_logits, logits, windows.targets, windows.labels)
