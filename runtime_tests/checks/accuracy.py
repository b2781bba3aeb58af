"""How far two sets of logits are apart: pure functions on arrays.

The metrics are those of llama.cpp's `llama-perplexity --kl-divergence`: the reference's distribution over the
vocabulary is the truth at every position, and uncertainties are standard errors of the mean over positions. Arrays
may be memory-mapped and are read one window at a time: W windows, S scored positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime_tests.evidence.record import Comparison, Slice

_Floats = NDArray[np.floating[Any]]
BEST_SQNR_DB = 200.0
"""Reported for equal logits: float64 resolves no more."""
_ROWS = 4
"""Of logits, whose probabilities in float64 stay in a core's caches: 1.6 MB each of SmolLM2, 4 MB of Llama 3.2."""
_LARGEST_NLL = 500.0
"""Its exponential, and a multiple of that, are still finite in float64."""


@dataclass(frozen=True)
class Labels:
    """The groups that scored positions are counted in; labels may repeat."""

    windows: Sequence[str]
    """Domain of each window, [W]."""
    positions: Sequence[str]
    """Range of each position in a window, [S]."""


class _Scores(NamedTuple):
    """One number for each position: [S] of a window, [W, S] of all."""

    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64]

    def take(self, indices: NDArray[np.intp], axis: int) -> "_Scores":
        """Some windows (axis 0), or some positions of every window (axis 1)."""
        return _Scores(
            self.kl.take(indices, axis),
            self.agrees.take(indices, axis),
            self.nll.take(indices, axis),
            self.reference_nll.take(indices, axis),
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


class _Window(NamedTuple):
    """What remains of one window's logits."""

    scores: _Scores
    signal: float
    noise: float
    max_abs_error: float
    largest_logit: float


def log_softmax(logits: _Floats) -> NDArray[np.float64]:
    """x - log Σ exp x over the last axis, in float64, shifted by the maximum so that nothing overflows."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True).astype(np.float64)
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def kl_divergence(reference: _Floats, candidate: _Floats) -> NDArray[np.float64]:
    """KL(P‖Q) = Σ P (log P - log Q) in nats per position, from log-probabilities [S, V]."""
    total: NDArray[np.float64] = (np.exp(reference) * (reference - candidate)).sum(axis=-1)
    return np.maximum(total, 0.0)  # rounding can leave -1e-17


def _negative_log_likelihood(log_probabilities: _Floats, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log Q(next token) per position, nats."""
    picked = np.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]
    return -picked.astype(np.float64)


def perplexity(nll: NDArray[np.float64]) -> float:
    """exp(mean NLL), and 1e217 for anything above it: JSON has no infinity."""
    return float(np.exp(min(nll.mean(), _LARGEST_NLL)))


def perplexity_error(nll: NDArray[np.float64]) -> float:
    """Standard error of the perplexity, exp(mean) · s/√n with the sample deviation s (llama.cpp's ± value)."""
    return perplexity(nll) * float(nll.std(ddof=1) / np.sqrt(nll.size))


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio of the logits, 10·log10(Σ ref² / Σ (ref - candidate)²), dB."""
    floor = 10 ** (-BEST_SQNR_DB / 10)
    return float(-10 * np.log10(max(noise / signal, floor))) if signal > 0 else 0.0


def _signal_and_noise(reference: _Floats, candidate: _Floats) -> tuple[float, float]:
    """Σ ref² and Σ (ref - candidate)², the two sides of an SQNR."""
    difference = reference.astype(np.float64) - candidate
    return float(np.square(reference, dtype=np.float64).sum()), float(np.square(difference).sum())


def sqnr_by_window(reference: _Floats, candidate: _Floats) -> list[float]:
    """SQNR of each window of logits [W, S, V], dB."""
    return [round(sqnr_db(*_signal_and_noise(*pair)), 2) for pair in zip(reference, candidate, strict=True)]


def not_finite(logits: _Floats) -> str:
    """The first window and step holding NaN or infinity, in words; empty when all are finite."""
    for window, rows in enumerate(logits):
        finite = np.isfinite(rows).all(axis=-1)
        if not finite.all():
            return f"NaN or infinity in window {window}, step {int(np.argmin(finite))}"
    return ""


def _score_window(reference: _Floats, candidate: _Floats, targets: NDArray[np.int64]) -> _Window:
    """In few rows at a time, and in place: large arrays are new memory each time, which costs more than the numbers."""
    rows = [slice(start, start + _ROWS) for start in range(0, len(reference), _ROWS)]
    parts = [_score_rows(reference[some], candidate[some], targets[some]) for some in rows]
    scores = _Scores(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    difference = reference.astype(np.float64)
    squares = np.square(difference)
    signal = float(squares.sum())
    difference -= candidate
    noise = float(np.square(difference, out=squares).sum())
    largest_error = float(np.abs(difference, out=difference).max())
    return _Window(scores, signal, noise, largest_error, float(max(reference.max(), -reference.min())))


def _score_rows(reference: _Floats, candidate: _Floats, targets: NDArray[np.int64]) -> _Scores:
    truth, guess = log_softmax(reference), log_softmax(candidate)
    return _Scores(
        kl=kl_divergence(truth, guess),
        agrees=reference.argmax(axis=-1) == candidate.argmax(axis=-1),
        nll=_negative_log_likelihood(guess, targets),
        reference_nll=_negative_log_likelihood(truth, targets),
    )


def compare(reference: _Floats, candidate: _Floats, targets: NDArray[np.int64], labels: Labels) -> Comparison:
    """Every metric of candidate logits [W, S, V] against reference logits, with next tokens [W, S]."""
    if reference.shape != candidate.shape or reference.shape[:2] != targets.shape:
        raise ValueError(f"shapes do not fit: {reference.shape}, {candidate.shape}, {targets.shape}")
    if targets.shape != (len(labels.windows), len(labels.positions)):
        raise ValueError(f"{len(labels.windows)} × {len(labels.positions)} labels for positions {targets.shape}")
    return _summarize([_score_window(*window) for window in zip(reference, candidate, targets, strict=True)], labels)


def _summarize(windows: Sequence[_Window], labels: Labels) -> Comparison:
    every = _Scores(*(np.stack(arrays) for arrays in zip(*(window.scores for window in windows), strict=True)))
    max_abs = max(window.max_abs_error for window in windows)
    largest = max(window.largest_logit for window in windows)
    return Comparison(
        **every.describe().model_dump(),
        max_kl=float(every.kl.max()),
        perplexity_error=perplexity_error(every.nll),
        reference_perplexity_error=perplexity_error(every.reference_nll),
        sqnr_db=sqnr_db(sum(w.signal for w in windows), sum(w.noise for w in windows)),
        max_abs_error=max_abs,
        max_relative_error=max_abs / largest if largest else 0.0,
        kl_by_step=tuple(every.kl.mean(axis=0).tolist()),
        kl_by_window=tuple(every.kl.mean(axis=1).tolist()),
        top1_by_window=tuple(every.agrees.mean(axis=1).tolist()),
        by_domain=_slices(every, labels.windows, axis=0),
        by_position=_slices(every, labels.positions, axis=1),
    )


def _slices(every: _Scores, labels: Sequence[str], *, axis: int) -> dict[str, Slice]:
    """The slice of each label of an axis (0: windows, 1: positions in them), in order of first appearance."""
    names = np.array(labels)
    distinct = dict.fromkeys(labels)
    return {label: short(every.take(np.flatnonzero(names == label), axis).describe()) for label in distinct}


def short(part: Slice) -> Slice:
    """Six digits of every number, far below its uncertainty: a record has dozens of slices."""
    return Slice.model_validate({name: float(f"{value:.6g}") for name, value in part})
