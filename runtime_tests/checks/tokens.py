"""An artifact's greedy tokens: against the golden answer, and an attached device's against this machine's.

Two processors round differently in the last bit, and int8 activations make that bit grow (docs/decisions.md, "Rounding
is chaotic"). So two answers may differ, but only from a choice on that noise can decide: the gap between the two
tokens' logits on this machine must be at most three standard deviations of the noise in such a gap.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.architecture import Strict
from export.errors import is_own
from export.host.console import stage
from export.manifest import ROOT, Manifest
from export.plan import ModelSpec, file_of, load_named, names
from runtime_tests import jobs
from runtime_tests.evaluation import Windows
from runtime_tests.evidence.record import Outcome
from runtime_tests.sessions.base import common_prefix

from . import gates
from .comparisons import References
from .subject import Finding, Subject

GOLDEN = ROOT / "runtime_tests" / "checks" / "golden_tokens"
_DEVIATIONS = 3


class Golden(Strict):
    """One answer in the repository, made by `golden.py`."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    smallest_margin: float
    """Smallest lead of the best token over the second best in any step, in logits."""
    logit_rms: float
    """Root mean square of the logits in all steps, the scale of the margin."""


def golden_of(described: Manifest) -> Golden | None:
    """The golden answer, if there is one, of an artifact built from its model's weights in configs/models.

    None too for one with a policy, which attends to other tokens.
    """
    name, recipe = described.plan.model.name, described.plan.quant.name
    path = GOLDEN / f"{name}_{recipe}.json"
    if not path.is_file() or name not in names("models") or described.plan.policy:
        return None
    if is_own(file_of("models", name)) or is_own(file_of("quant", recipe)):  # another model or recipe of that name
        return None
    own_weights = described.checkpoint.origin == load_named(ModelSpec, "models", name).source
    return Golden.model_validate_json(path.read_bytes()) if own_weights else None


def check_golden(subject: Subject) -> Finding:
    """The artifact gives exactly the golden answer, where its model has one."""
    golden = golden_of(subject.manifest)
    if golden is None:
        return Finding()
    count, threads = len(golden.tokens), subject.setting.place.threads
    job = jobs.GenerateJob(folder=subject.folder_text, threads=threads, prompt=golden.prompt, count=count)
    with stage("golden", f"{count} tokens"):
        tokens = subject.run_on_device(job, "golden")["tokens"]
    equal = common_prefix(tokens, golden.tokens)
    return Finding((gates.judge("golden tokens", equal, "at least", count, Outcome.MISMATCH),))


def check_device(subject: Subject, windows: Windows, references: References) -> Finding:
    """An attached device generates the tokens that this machine does, where the target has a limit for them."""
    count, setting = subject.limits.compared_tokens, subject.setting
    if count is None or not setting.place.attached:
        return Finding()
    prompt = tuple(windows.tokens[0, : windows.prefill].tolist())
    with stage("tokens", f"{count}, here and there"):
        job = jobs.GenerateJob(folder=subject.folder_text, threads=setting.threads, prompt=prompt, count=count)
        here = subject.run_here(job, "tokens here")["tokens"]
        job = job.model_copy(update={"threads": setting.place.threads})
        there = subject.run_on_device(job, "tokens there")["tokens"]
        same = common_prefix(here, there)
        gap = 0.0
        if same < count:
            logits = logits_here(subject, [*prompt, *here[:same]])
            gap = float(logits[here[same]] - logits[there[same]])
        noise = _DEVIATIONS * _gap_noise(references.quantized, references.noise) if references.noise else 0.0
    return Finding((gates.same_tokens(same, count, gap, noise),))


def logits_here(subject: Subject, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits [V] of the artifact on this machine after these tokens."""
    file, out = subject.setting.scratch / "parting.npy", subject.setting.scratch / "parting-logits.npy"
    np.save(file, np.array([[*tokens, 0]], np.int64))  # the last one is not fed
    task = jobs.Task(tokens=str(file), prefill=len(tokens), out=str(out))
    job = jobs.LogitsJob(folder=subject.folder_text, threads=subject.setting.threads, tasks=(task,))
    subject.run_here(job, "parting")
    logits: NDArray[np.float32] = np.load(out)[0, 0]
    return logits


def _gap_noise(quantized: Path, noise: Path) -> float:
    """Standard deviation that noise of one ulp gives the difference of two logits; from files of logits [W, S, V]."""
    quiet, noisy = np.load(quantized, mmap_mode="r"), np.load(noise, mmap_mode="r")
    # two independent logits: the variance of their difference is twice that of one
    return float(np.sqrt(2 * np.mean([np.var(a - b, axis=-1).mean() for a, b in zip(quiet, noisy, strict=True)])))
