"""Measured values against limits. Pure; knows nothing about how a value was measured."""

from collections.abc import Sequence
from math import sqrt
from statistics import stdev
from typing import Literal

from scipy.stats import t as student_t

from export.plan import QuantLimits, TargetLimits

from .record import Comparison, Gate, Latency, Outcome

Rule = Literal["at most", "at least"]


def judge(name: str, value: float, rule: Rule, limit: float, fails_as: Outcome, detail: str = "") -> Gate:
    """A gate; NaN is never within a limit."""
    holds = value <= limit if rule == "at most" else value >= limit
    verdict: Literal["pass", "fail"] = "pass" if holds else "fail"
    return Gate(name=name, value=value, limit=limit, rule=rule, verdict=verdict, fails_as=fails_as, detail=detail)


def count(name: str, problems: Sequence[str], fails_as: Outcome) -> Gate:
    """A gate that allows no problem at all and names the first ones."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return judge(name, len(problems), "at most", 0, fails_as, "; ".join(problems[:3]) + more)


def rewriting(measured: Comparison, limit: float) -> list[Gate]:
    """Hugging Face fp32 against our fp32."""
    detail = f"largest difference {measured.max_abs_error:.1e}"
    value = measured.max_relative_error
    return [judge("rewriting: max error", value, "at most", limit, Outcome.MISMATCH, detail)]


def quantization(measured: Comparison, limits: QuantLimits) -> list[Gate]:
    """Our fp32 against our quantized model: the recipe's limits."""
    return [
        judge("quantization: mean KL", measured.mean_kl, "at most", limits.max_mean_kl, Outcome.MISMATCH),
        judge("quantization: top-1", measured.top1, "at least", limits.min_top1, Outcome.MISMATCH),
    ]


def lowering(measured: Comparison, limits: TargetLimits, noise: Comparison | None) -> list[Gate]:
    """Our quantized model against the artifact: the target's limits, beyond float noise where that is measured."""
    detail = ""
    if noise is not None:
        limits = beyond(noise, measured, limits)
        detail = f"float noise alone: KL {noise.mean_kl:.4f}, top-1 {noise.top1:.1%}, SQNR {noise.sqnr_db:.1f} dB"
    return [
        judge("lowering: mean KL", measured.mean_kl, "at most", limits.max_mean_kl, Outcome.MISMATCH, detail),
        judge("lowering: top-1", measured.top1, "at least", limits.min_top1, Outcome.MISMATCH, detail),
        judge("lowering: SQNR", measured.sqnr_db, "at least", limits.min_sqnr_db, Outcome.MISMATCH, detail),
    ]


def beyond(noise: Comparison, measured: Comparison, limits: TargetLimits) -> TargetLimits:
    """Limits on top of what noise does, with the 95 % interval of the comparison of the two (Student's t)."""
    pairs = zip(measured.kl_by_window, noise.kl_by_window, strict=True)
    differences = [ours - floor for ours, floor in pairs]
    count = len(differences)
    kl_error = float(student_t.ppf(0.975, count - 1)) * stdev(differences) / sqrt(count) if count > 1 else 0.0
    top1_error = sqrt(2 * noise.top1 * (1 - noise.top1) / noise.positions)
    return limits.model_copy(
        update={
            "max_mean_kl": limits.max_mean_kl + noise.mean_kl + kl_error,
            "min_top1": limits.min_top1 * noise.top1 - 2 * top1_error,
            "min_sqnr_db": min(limits.min_sqnr_db, noise.sqnr_db - 2.0),
        }
    )


def probes(sqnr_db: Sequence[float], limit: float) -> Gate:
    """The best single-token prompt: a wrong lowering is wrong for every token, rounding noise is not."""
    detail = f"{sum(x >= limit for x in sqnr_db)} of {len(sqnr_db)} single-token prompts reach it"
    return judge("lowering: best probe SQNR", max(sqnr_db), "at least", limit, Outcome.MISMATCH, detail)


def same_tokens(same: int, count: int, gap: float, noise: float) -> Gate:
    """Greedy answers of two machines may part only where noise can decide: see `same_tokens.py`."""
    detail = f"{same} of {count} equal" + (
        f", then a choice this close here; noise {noise:.2g}" if same < count else ""
    )
    return judge("tokens as on this machine: gap in logits", gap, "at most", noise, Outcome.MISMATCH, detail)


def budgets(measured: Latency, *, min_decode_tps: float, max_ttft_s: float) -> list[Gate]:
    """Timings against what a device must reach."""
    decode = measured.tests[-1].avg_ts
    return [
        judge("decode tokens/s", decode, "at least", min_decode_tps, Outcome.TOO_SLOW),
        judge("time to first token, s", measured.ttft_p50_s, "at most", max_ttft_s, Outcome.TOO_SLOW),
    ]


def in_doubt(timed: Sequence[Gate], measured: Latency, *, max_cv: float, reason: str) -> list[Gate]:
    """Timings that vary by more than `max_cv`, slow down on the way or began hot decide only what is clear.

    `reason` says why they are doubtful whatever their spread; empty: they are not.
    """
    slowed = max(0.0, 1 - measured.last_third_ts / measured.first_third_ts)
    spread = max(measured.cv, slowed)
    if spread <= max_cv and not reason:
        return list(timed)
    what = "slow down" if slowed > measured.cv else "vary"
    detail = reason or f"timings {what} by {spread:.0%}, more than {max_cv:.0%}"
    noise = {"verdict": "inconclusive", "detail": detail}
    return [gate.model_copy(update=noise) if close(gate, max(spread, max_cv)) else gate for gate in timed]


def close(gate: Gate, cv: float) -> bool:
    """Whether noise could put the value on the other side of its limit."""
    return abs(gate.value - gate.limit) <= 3 * cv * gate.value


def outcome_of(gates: Sequence[Gate]) -> tuple[Outcome, str]:
    """The first failed gate's outcome and what it found; else inconclusive, else pass."""
    for gate in gates:
        if gate.verdict == "fail":
            found = f"{gate.name} is {gate.value:.4g}, must be {gate.rule} {gate.limit:.4g}"
            return gate.fails_as, f"{found}: {gate.detail}" if gate.detail else found
    doubtful = next((gate for gate in gates if gate.verdict == "inconclusive"), None)
    return (Outcome.INCONCLUSIVE, doubtful.detail) if doubtful else (Outcome.PASS, "")
