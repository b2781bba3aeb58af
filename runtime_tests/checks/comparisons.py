"""Three comparisons, one suspect each: rewriting, quantization, lowering.

Hugging Face fp32 → our fp32 → our quantized model → the artifact. The total, from the first to the last, is what the
artifact loses as shipped; no gate judges it. References are computed by eager PyTorch in a child process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoints import tokenizer
from export.errors import ExportError
from export.host import disk
from export.host.console import stage
from runtime_tests import evaluation, jobs, reference
from runtime_tests.evaluation import Windows
from runtime_tests.evidence.record import Comparison, Outcome
from runtime_tests.jobs import logits_file

from . import accuracy, gates
from .accuracy import Labels
from .subject import Finding, StoppedError, Subject, require

_PROBES = 64
_FAR = ("far noise ", "far ")


@dataclass(frozen=True)
class _Tokens:
    """Windows, and the file in which child processes read them."""

    windows: Windows
    file: Path

    def task(self, out: Path) -> dict[str, Any]:
        """The fields of a job's task that feeds these windows."""
        return {"tokens": str(self.file), "prefill": self.windows.prefill, "out": str(out)}


@dataclass(frozen=True)
class References:
    """Files of the logits that an artifact is compared with, float32 [W, decode + 1, V]."""

    huggingface: Path
    fp32: Path
    quantized: Path
    noise: Path | None = None
    """Our quantized model with float noise, where the runtime quantizes activations."""
    probes: Path | None = None
    """Of the quantized model for single tokens, where the target has a limit for them."""
    far: tuple[Path, ...] = ()
    """Of the quantized model, whose cache is float32, for each of `Cut.far`."""
    far_noise: tuple[Path, ...] = ()
    """The same as `noise`."""


@dataclass(frozen=True)
class Cut:
    """All that is fed."""

    windows: _Tokens
    """The evaluation's."""
    probes: _Tokens
    """Prompts of one token each."""
    template: _Tokens
    """What the chat template writes."""
    far: Mapping[str, _Tokens]
    """Up to places of the context, where the artifact's cache has a kind with limits of its own, or a policy."""


def cut_tokens(subject: Subject) -> Cut:
    """All that is fed to references and artifact.

    Raises StoppedError: the tokenizer is unreadable.
    """
    try:
        loaded = tokenizer.load(subject.folder)
    except ExportError as error:
        raise StoppedError(Outcome.TOKENIZER_DIFFERS, str(error)) from None
    windows = evaluation.cut_windows(subject.setting.evaluation, loaded, subject.manifest)
    distinct = np.unique(windows.tokens)
    singles = distinct[:: max(1, len(distinct) // _PROBES)][:_PROBES]
    probes = Windows(np.stack([singles, singles], axis=1), ("probe",) * len(singles), prefill=1)
    scratch = subject.setting.scratch
    template = evaluation.template_window(loaded, subject.manifest)
    far = evaluation.far_windows(subject.setting.evaluation, loaded, subject.manifest) if subject.far_limits else {}
    return Cut(
        windows=_save(windows, scratch / "windows.npy"),
        probes=_save(probes, scratch / "probes.npy"),
        template=_save(template, scratch / "template.npy"),
        far={place: _save(window, scratch / f"far-{number}.npy") for number, (place, window) in enumerate(far.items())},
    )


def _save(windows: Windows, file: Path) -> _Tokens:
    np.save(file, windows.tokens)
    return _Tokens(windows, file)


def compute_references(subject: Subject, cut: Cut) -> References:
    """Every reference of this artifact; those that are not cached are computed in one child process."""
    plan, cached, windows = subject.manifest.plan, subject.setting.cache, cut.windows
    kinds: dict[str, tuple[reference.Kind, _Tokens]] = {
        "huggingface": ("huggingface", windows),
        "fp32": ("fp32", windows),
        "quantized": ("quantized", windows),
    }
    rounds = plan.target.activations != "none" and plan.quant.method != "none"
    if rounds:
        kinds["noise"] = ("noise", windows)
    if subject.limits.min_probe_sqnr_db is not None:
        kinds["probes"] = ("quantized", cut.probes)
    kinds |= {f"far {place}": ("quantized", tokens) for place, tokens in cut.far.items()}
    kinds |= {f"far noise {place}": ("noise", tokens) for place, tokens in cut.far.items() if rounds}
    files = {
        name: reference.locate(kind, subject.manifest, tokens.windows.tokens, cached)
        for name, (kind, tokens) in kinds.items()
    }
    vocab = subject.manifest.architecture.vocab_size
    shapes = {name: (*tokens.windows.targets.shape, vocab) for name, (_, tokens) in kinds.items()}
    with subject.setting.turns.for_all():
        missing = [name for name, file in files.items() if not logits_file.is_whole(file, shapes[name])]
        for name in files.keys() - set(missing):
            disk.used(files[name])
        if missing:
            with stage("references", ", ".join(missing)):
                _compute_missing(subject, [(*kinds[name], files[name]) for name in missing])
    far_noise, far = (tuple(files.pop(name) for name in list(files) if name.startswith(kind)) for kind in _FAR)
    return References(**files, far=far, far_noise=far_noise)


def _compute_missing(subject: Subject, missing: Sequence[tuple[reference.Kind, _Tokens, Path]]) -> None:
    """Compute references in a child process and move them into the cache once they are complete."""
    partial = [subject.setting.scratch / file.name for _, _, file in missing]
    tasks = [
        jobs.ReferenceTask(kind=kind, **tokens.task(out))
        for (kind, tokens, _), out in zip(missing, partial, strict=True)
    ]
    job = jobs.ReferenceJob(
        folder=subject.folder_text,
        source=subject.setting.source,
        cache=subject.cache_text,
        threads=subject.setting.threads,
        tasks=tuple(tasks),
    )
    subject.run_here(job, "references")
    subject.setting.cache.mkdir(parents=True, exist_ok=True)
    for out, (_, _, file) in zip(partial, missing, strict=True):
        out.replace(file)


def compare_references(subject: Subject, windows: Windows, references: References) -> Finding:
    """Hugging Face fp32 → our fp32 → our quantized model, → itself with float noise if activations are quantized."""
    with stage("compare", "rewriting and quantization"):
        rewriting = _compare(subject, windows, references.huggingface, references.fp32)
        quantization = _compare(subject, windows, references.fp32, references.quantized)
        noise = (
            {"noise": _compare(subject, windows, references.quantized, references.noise)} if references.noise else {}
        )
    return Finding(
        gates=(
            *gates.rewriting(rewriting, subject.setting.evaluation.max_rewriting_error),
            *gates.quantization(quantization, subject.judged_by.quant),
        ),
        comparisons={"rewriting": rewriting, "quantization": quantization} | noise,
    )


def compare_artifact(subject: Subject, cut: Cut, references: References, noise: Comparison | None) -> Finding:
    """The artifact in its runtime, with a filled cache, against our quantized model and against Hugging Face's.

    Single tokens are compared too, where the target has a limit for them. The template's tokens, which the evaluation's
    text does not hold, must give numbers. Raises StoppedError: NaN or infinity.
    """
    windows, template = cut.windows, cut.template
    out, probes_out, template_out = (
        subject.setting.scratch / f"artifact{name}.npy" for name in ("", "-probes", "-template")
    )
    tasks = [jobs.Task(**windows.task(out)), jobs.Task(**template.task(template_out))]
    tasks += [jobs.Task(**cut.probes.task(probes_out))] if references.probes else []
    with stage("artifact", f"{len(windows.windows.tokens)} windows"):
        job = jobs.LogitsJob(folder=subject.folder_text, threads=subject.setting.place.threads, tasks=tuple(tasks))
        measures_speed = subject.run_on_device(job, "artifact")["measures_speed"]
    problem = accuracy.not_finite(np.load(out, mmap_mode="r"))
    finite = require(gates.count("logits finite: problems", [problem] if problem else [], Outcome.MISMATCH), problem)
    finite += _require_template(template.windows, np.load(template_out))
    with stage("compare", "lowering and total"):
        lowering = _compare(subject, windows.windows, references.quantized, out)
        total = _compare(subject, windows.windows, references.huggingface, out)
    limits = subject.limits
    finding = finite + Finding(
        tuple(gates.lowering(lowering, limits, noise)),
        comparisons={"lowering": lowering, "total": total},
        evaluated=not measures_speed,
    )
    if references.probes is None or limits.min_probe_sqnr_db is None:
        return finding
    sqnr_db = accuracy.sqnr_by_window(np.load(references.probes), np.load(probes_out))
    return finding + Finding((gates.probes(sqnr_db, limits.min_probe_sqnr_db),), probe_sqnr_db=tuple(sqnr_db))


def _require_template(template: Windows, logits: NDArray[np.float32]) -> Finding:
    """A residual beyond fp16 at a special token spoils each conversation and no text. Raises StoppedError."""
    spoiled = np.flatnonzero(~np.isfinite(logits[0]).all(axis=-1))
    problems = [
        f"NaN or infinity after token {template.tokens[0, place]}, place {place} of a message as the chat template "
        "writes it, which text does not hold: beyond the range of the runtime's numbers"
        for place in spoiled[:1]
    ]
    gate = gates.count("template tokens finite: problems", problems, Outcome.MISMATCH)
    return require(gate, "".join(problems))


def compare_cache(subject: Subject, cut: Cut, references: References) -> Finding:
    """The artifact against our quantized model near some places of its context and at its end."""
    if (limits := subject.far_limits) is None:
        return Finding()
    windows, outs = list(cut.far.values()), [subject.setting.scratch / f"artifact-{i}.npy" for i in range(len(cut.far))]
    tasks = tuple(jobs.Task(**tokens.task(out)) for tokens, out in zip(windows, outs, strict=True))
    with stage("far", f"{len(windows)} places, the last at {list(cut.far)[-1]}"):
        job = jobs.LogitsJob(folder=subject.folder_text, threads=subject.setting.place.threads, tasks=tasks)
        subject.run_on_device(job, "far")
        with subject.setting.turns.given_away():
            measured = _compare_far(cut.far, references.far, outs)
            noise = _compare_far(cut.far, references.far, references.far_noise) if references.far_noise else None
    return Finding(tuple(gates.cache(measured, noise, limits)), comparisons={"cache": measured})


def _compare_far(windows: Mapping[str, _Tokens], references: Sequence[Path], candidates: Sequence[Path]) -> Comparison:
    """One comparison of all places, which are its positions."""
    reference, candidate = (np.concatenate([np.load(file) for file in files]) for files in (references, candidates))
    targets = np.concatenate([tokens.windows.targets for tokens in windows.values()])
    labels = Labels(tuple(windows), ("",) * targets.shape[1])
    compared = accuracy.compare(reference, candidate, targets, labels)
    return compared.model_copy(update={"by_position": compared.by_domain, "by_domain": {}})


def _compare(subject: Subject, windows: Windows, reference_file: Path, candidate_file: Path) -> Comparison:
    """Numbers only, so that others have their turn; what several artifacts share is compared once."""

    def compare() -> Comparison:
        reference_logits, logits = np.load(reference_file, mmap_mode="r"), np.load(candidate_file, mmap_mode="r")
        return accuracy.compare(reference_logits, logits, windows.targets, windows.labels)

    with subject.setting.turns.given_away():
        return subject.setting.shared.once((windows.sha256, reference_file, candidate_file), compare)
