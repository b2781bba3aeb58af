"""Measured values against limits: pure functions that return gates."""

from collections.abc import Sequence
from math import sqrt
from typing import Literal

from export.plan import QuantLimits, TargetLimits
from export.toolbox import significance
from export.toolbox.tables import number
from runtime_tests.evidence.record import Comparison, Gate, Latency, Outcome

Rule = Literal["at most", "at least"]


def judge(name: str, value: float, rule: Rule, limit: float, fails_as: Outcome, detail: str = "") -> Gate:
    """A gate; NaN is never within a limit."""
    holds = value <= limit if rule == "at most" else value >= limit
    verdict: Literal["pass", "fail"] = "pass" if holds else "fail"
    return Gate(name=name, value=value, limit=limit, rule=rule, verdict=verdict, fails_as=fails_as, detail=detail)


def count(name: str, problems: Sequence[str], fails_as: Outcome) -> Gate:
    """A gate that fails on any problem; its detail names the first three."""
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
    """The limits, widened by the loss of noise alone and by the 95 % interval of the two losses' difference."""
    kl_error = significance.paired(noise.kl_by_window, measured.kl_by_window)
    top1_error = sqrt(2 * noise.top1 * (1 - noise.top1) / noise.positions)
    return limits.model_copy(
        update={
            "max_mean_kl": limits.max_mean_kl + noise.mean_kl + kl_error,
            "min_top1": limits.min_top1 * noise.top1 - 2 * top1_error,
            "min_sqnr_db": min(limits.min_sqnr_db, noise.sqnr_db - 2.0),
        }
    )


def cache(measured: Comparison, noise: Comparison | None, limits: TargetLimits) -> list[Gate]:
    """Our quantized model, with a float32 cache, against the artifact, where its cache loses most.

    Beyond float noise, where that is measured. Scales that are too small break far from the start only.
    """
    places = measured.by_position
    kl = {place: part.mean_kl - (noise.by_position[place].mean_kl if noise else 0) for place, part in places.items()}
    top1 = {place: part.top1 / (noise.by_position[place].top1 if noise else 1) for place, part in places.items()}
    worst_kl, worst_top1 = max(kl, key=lambda place: kl[place]), min(top1, key=lambda place: top1[place])
    detail = "KL " + ", ".join(f"{value:.4f} at {place}" for place, value in kl.items())
    return [
        judge("cache: mean KL", kl[worst_kl], "at most", limits.max_mean_kl, Outcome.MISMATCH, detail),
        judge("cache: top-1", top1[worst_top1], "at least", limits.min_top1, Outcome.MISMATCH, f"at {worst_top1}"),
    ]


def probes(sqnr_db: Sequence[float], limit: float) -> Gate:
    """The best SQNR of single-token prompts: a wrong lowering spoils every one of them, rounding noise does not."""
    detail = f"{sum(x >= limit for x in sqnr_db)} of {len(sqnr_db)} single-token prompts reach it"
    return judge("lowering: best probe SQNR", max(sqnr_db), "at least", limit, Outcome.MISMATCH, detail)


def same_tokens(same: int, count: int, gap: float, noise: float) -> Gate:
    """Greedy answers of two machines may differ only from a choice on that noise can decide: see `tokens.py`."""
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
    """Gates of timings that vary by more than `max_cv`, or slow down by it, are inconclusive where the call is close.

    `reason` makes them doubtful whatever their spread (the device was hot); empty: there is none.
    """
    slowed = max(0.0, 1 - measured.last_third_ts / measured.first_third_ts)
    spread = max(measured.cv, slowed)
    if spread <= max_cv and not reason:
        return list(timed)
    effect = "slow down" if slowed > measured.cv else "vary"
    detail = reason or f"timings {effect} by {spread:.0%}, more than {max_cv:.0%}"
    noise = {"verdict": "inconclusive", "detail": detail}
    return [gate.model_copy(update=noise) if _is_close(gate, max(spread, max_cv)) else gate for gate in timed]


def _is_close(gate: Gate, cv: float) -> bool:
    """Whether three standard deviations of noise could put the value on the other side of its limit."""
    return abs(gate.value - gate.limit) <= 3 * cv * gate.value


def failure(gate: Gate) -> str:
    """What a failed gate found, without its detail."""
    return f"{gate.name} is {number(gate.value)}, must be {gate.rule} {number(gate.limit)}"


def outcome_of(gates: Sequence[Gate]) -> tuple[Outcome, str]:
    """The outcome and the description of the first failed gate; else inconclusive, else pass."""
    for gate in gates:
        if gate.verdict == "fail":
            return gate.fails_as, f"{failure(gate)}: {gate.detail}" if gate.detail else failure(gate)
    doubtful = next((gate for gate in gates if gate.verdict == "inconclusive"), None)
    return (Outcome.INCONCLUSIVE, doubtful.detail) if doubtful else (Outcome.PASS, "")
