"""How far two sets of logits are apart. Pure functions on arrays; knows nothing about models or files.

As `llama-perplexity --kl-divergence` of llama.cpp does it: the reference's distribution over the vocabulary is the
truth at every position, and uncertainties are standard errors of the mean over positions. Arrays may be
memory-mapped and are walked one window at a time: W windows, S scored positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .record import Comparison, Slice

Floats = NDArray[np.floating[Any]]
BEST_SQNR_DB = 200.0
"""Reported when nothing differs: float64 cannot tell more."""


LARGEST_NLL = 500.0
"""Its exponential, and a multiple of that, are still finite in float64."""


@dataclass(frozen=True)
class WindowScores:
    """What is kept of one window; each array has one number per position, [S]."""

    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64]
    signal: float
    noise: float
    max_abs_error: float
    largest_logit: float


@dataclass(frozen=True)
class Labels:
    """What the scored positions belong to; labels may repeat."""

    windows: Sequence[str]
    """Domain of each window, W of them."""
    positions: Sequence[str]
    """Range of each position in a window, S of them."""


@dataclass(frozen=True)
class Positions:
    """Scores of the positions of some windows, [W, S] each."""

    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64]

    def take(self, indices: NDArray[np.intp], axis: int) -> "Positions":
        """Some windows (axis 0), or some positions of every window (axis 1)."""
        return Positions(
            kl=self.kl.take(indices, axis),
            agrees=self.agrees.take(indices, axis),
            nll=self.nll.take(indices, axis),
            reference_nll=self.reference_nll.take(indices, axis),
        )

    def describe(self) -> Slice:
        """All of them as one line of a record."""
        return Slice(
            positions=self.kl.size,
            mean_kl=float(self.kl.mean()),
            p99_kl=float(np.quantile(self.kl, 0.99)),
            top1=float(self.agrees.mean()),
            perplexity=perplexity(self.nll),
            reference_perplexity=perplexity(self.reference_nll),
        )


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """x - log Σ exp x over the last axis, in float64, shifted by the maximum so that nothing overflows."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True).astype(np.float64)
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def kl_divergence(reference: Floats, candidate: Floats) -> NDArray[np.float64]:
    """KL(P‖Q) = Σ P (log P - log Q) in nats per position, from log-probabilities [S, V]."""
    total: NDArray[np.float64] = (np.exp(reference) * (reference - candidate)).sum(axis=-1)
    return np.maximum(total, 0.0)  # rounding can leave -1e-17


def negative_log_likelihood(log_probabilities: Floats, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log Q(next token) per position, nats."""
    picked = np.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]
    return -picked.astype(np.float64)


def perplexity(nll: NDArray[np.float64]) -> float:
    """exp(mean NLL), and 1e217 for anything above it: JSON has no infinity."""
    return float(np.exp(min(nll.mean(), LARGEST_NLL)))


def perplexity_error(nll: NDArray[np.float64]) -> float:
    """Standard error of the perplexity, exp(mean) · s/√n with the sample deviation s (llama.cpp's ± value)."""
    return perplexity(nll) * float(nll.std(ddof=1) / np.sqrt(nll.size))


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio of the logits, 10·log10(Σ ref² / Σ (ref - candidate)²), dB."""
    floor = 10 ** (-BEST_SQNR_DB / 10)
    return float(-10 * np.log10(max(noise / signal, floor))) if signal > 0 else 0.0


def signal_and_noise(reference: Floats, candidate: Floats) -> tuple[float, float]:
    """Σ ref² and Σ (ref - candidate)², the two sides of an SQNR."""
    difference = reference.astype(np.float64) - candidate
    return float(np.square(reference, dtype=np.float64).sum()), float(np.square(difference).sum())


def sqnr_by_window(reference: Floats, candidate: Floats) -> list[float]:
    """SQNR of each window of logits [W, S, V], dB."""
    return [round(sqnr_db(*signal_and_noise(*pair)), 2) for pair in zip(reference, candidate, strict=True)]


def not_finite(logits: Floats) -> str:
    """The first window and step holding NaN or infinity, in words; empty when all are finite."""
    for window, rows in enumerate(logits):
        finite = np.isfinite(rows).all(axis=-1)
        if not finite.all():
            return f"NaN or infinity in window {window}, step {int(np.argmin(finite))}"
    return ""


def score_window(reference: Floats, candidate: Floats, targets: NDArray[np.int64]) -> WindowScores:
    """Compare one window's logits [S, V]."""
    truth, guess = log_softmax(reference), log_softmax(candidate)
    signal, noise = signal_and_noise(reference, candidate)
    return WindowScores(
        kl=kl_divergence(truth, guess),
        agrees=reference.argmax(axis=-1) == candidate.argmax(axis=-1),
        nll=negative_log_likelihood(guess, targets),
        reference_nll=negative_log_likelihood(truth, targets),
        signal=signal,
        noise=noise,
        max_abs_error=float(np.abs(reference.astype(np.float64) - candidate).max()),
        largest_logit=float(np.abs(reference).max()),
    )


def compare(reference: Floats, candidate: Floats, targets: NDArray[np.int64], labels: Labels) -> Comparison:
    """Every metric of candidate logits [W, S, V] against reference logits, for next tokens [W, S]."""
    if reference.shape != candidate.shape or reference.shape[:2] != targets.shape:
        raise ValueError(f"shapes do not fit: {reference.shape}, {candidate.shape}, {targets.shape}")
    if targets.shape != (len(labels.windows), len(labels.positions)):
        raise ValueError(f"{len(labels.windows)} × {len(labels.positions)} labels for positions {targets.shape}")
    return summarize([score_window(*window) for window in zip(reference, candidate, targets, strict=True)], labels)


def summarize(scores: Sequence[WindowScores], labels: Labels) -> Comparison:
    """Window scores → the numbers of a record."""
    every = Positions(
        kl=np.stack([score.kl for score in scores]),
        agrees=np.stack([score.agrees for score in scores]),
        nll=np.stack([score.nll for score in scores]),
        reference_nll=np.stack([score.reference_nll for score in scores]),
    )
    max_abs = max(score.max_abs_error for score in scores)
    largest = max(score.largest_logit for score in scores)
    return Comparison(
        **every.describe().model_dump(),
        max_kl=float(every.kl.max()),
        perplexity_error=perplexity_error(every.nll),
        reference_perplexity_error=perplexity_error(every.reference_nll),
        sqnr_db=sqnr_db(sum(s.signal for s in scores), sum(s.noise for s in scores)),
        max_abs_error=max_abs,
        max_relative_error=max_abs / largest if largest else 0.0,
        kl_by_step=tuple(every.kl.mean(axis=0).tolist()),
        kl_by_window=tuple(every.kl.mean(axis=1).tolist()),
        by_domain=slices(every, labels.windows, axis=0),
        by_position=slices(every, labels.positions, axis=1),
    )


def slices(every: Positions, labels: Sequence[str], *, axis: int) -> dict[str, Slice]:
    """What is under each label of an axis (0: windows, 1: positions in them), in order of first appearance."""
    names = np.array(labels)
    found = {label: every.take(np.flatnonzero(names == label), axis).describe() for label in dict.fromkeys(labels)}
    return {label: short(part) for label, part in found.items()}


def short(part: Slice) -> Slice:
    """Six digits of every number, far below its uncertainty: a record has dozens of slices."""
    return Slice.model_validate({name: float(f"{value:.6g}") for name, value in part})
