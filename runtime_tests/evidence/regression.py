"""A run against the baseline: what became larger, worse or slower, beyond what the noise of both explains.

Pure functions on values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from export.architecture import Strict
from export.errors import ExportError
from export.manifest import Commit
from export.toolbox import significance
from export.toolbox.tables import number
from runtime_tests.checks import gates

from .record import Comparison, Gate, Latency, Outcome, PlanKey, SpeedTest, Verdict

_SIZE_FLOOR = 0.01
"""Of the baseline's size. Builds are byte-identical, so a size has no noise; tool versions change a few bytes."""
_KL_FLOOR = 0.05
"""Of the baseline's KL."""
KL_FLOOR_NATS = 1e-4
"""Where almost nothing is lost, several times as much is as good."""
_SPEED_FLOOR = 0.10
"""Of the baseline's rate or time. A smaller difference is none, however steady the timings."""
_BLIND = 2.0
"""Times the limit: more noise hides what a comparison should find."""
_ENOUGH_RUNS = 3
"""From so many runs on, the differences between them are noise too: one run does not show a machine's slow day."""
HIDDEN = ": so much noise hides what a change does"
"""The end of the detail of a gate that is inconclusive only because of the noise between runs."""
AGAINST = " against baseline, "
"""In the name of every gate made here, before its unit."""


class Timing(Strict):
    """One timing in the form that is compared."""

    value: float
    stddev: float
    repeats: int


class Speed(Strict):
    """The speed of one run."""

    run_id: str
    decode_ts: Timing
    ttft_s: Timing


class Reached(Strict):
    """The baseline of one artifact."""

    run_id: str
    commit: Commit
    plan_key: PlanKey
    size_bytes: int
    mean_kl: float
    """As shipped, nats."""
    kl_by_window: tuple[float, ...]
    speeds: tuple[Speed, ...]
    """Of steady runs, newest last; empty: not timed, or too noisy."""


@dataclass(frozen=True)
class Change:
    """One number of the baseline and of this run; all in its unit."""

    name: str
    unit: str
    before: float
    since: str
    """The run or runs that the baseline's number is from."""
    now: float
    limit: float
    """The most it may be worse by."""
    noise: float
    """Half the 95 % interval of the difference."""
    worse: Literal["more", "less"]
    fails_as: Outcome
    gated: bool = True
    """Whether it may fail an artifact; otherwise it is shown only."""

    @property
    def worse_by(self) -> float:
        """Negative: better."""
        return self.now - self.before if self.worse == "more" else self.before - self.now

    @property
    def is_beyond(self) -> bool:
        """Measured worse than the limit allows, whether noise may explain it or not; NaN is."""
        return not self.worse_by <= self.limit

    @property
    def verdict(self) -> Verdict:
        """Fail: beyond limit and noise. Inconclusive: noise may explain it, or hide a loss of twice the limit."""
        if self.is_beyond:
            return "inconclusive" if self.worse_by <= self.noise else "fail"
        visible = _BLIND * self.limit
        return "inconclusive" if self.noise > visible and self.worse_by + self.noise > visible else "pass"


def judge(change: Change) -> Gate:
    """A change as a gate of the record."""
    more = change.worse == "more"
    limit = change.before + (change.limit if more else -change.limit)
    detail = f"{number(change.before)} in {change.since}, noise {change.noise:.2g}"
    if change.verdict == "inconclusive":
        detail += HIDDEN
    name = f"{change.name}{AGAINST}{change.unit}"
    rule: gates.Rule = "at most" if more else "at least"
    gate = gates.judge(name, change.now, rule, limit, change.fails_as, detail)
    return gate.model_copy(update={"verdict": change.verdict})


def shipped(size_bytes: int, total: Comparison, before: Reached) -> list[Change]:
    """The size of the artifact, and its KL as shipped."""
    old_mb, new_mb, run = before.size_bytes / 1e6, size_bytes / 1e6, f"run {before.run_id}"
    if len(before.kl_by_window) != len(total.kl_by_window):
        raise ExportError(
            f"the baseline's run {before.run_id} has {len(before.kl_by_window)} windows, this one "
            f"{len(total.kl_by_window)}: remove the baseline, then `make baseline`"
        )
    floor = max(_KL_FLOOR * before.mean_kl, KL_FLOOR_NATS)
    noise = significance.paired(before.kl_by_window, total.kl_by_window)
    return [
        Change("size", "MB", old_mb, run, new_mb, _SIZE_FLOOR * old_mb, 0.0, "more", Outcome.TOO_LARGE),
        Change("KL as shipped", "nats", before.mean_kl, run, total.mean_kl, floor, noise, "more", Outcome.MISMATCH),
    ]


def timed(measured: Latency, before: Reached) -> list[Change]:
    """Decode rate and time to first token, to be shown; nothing where the baseline has no speed.

    No gate: they are of other runs, and what else the machine did then is not known.
    """
    if not before.speeds:
        return []
    now, runs = speed_of(measured, ""), before.speeds
    since = f"run {runs[0].run_id}" if len(runs) == 1 else f"{len(runs)} runs, their mean"
    decode, ttft = [run.decode_ts for run in runs], [run.ttft_s for run in runs]
    return [
        _change_of("decode", "tokens/s", decode, since, now.decode_ts, "less"),
        _change_of("time to first token", "s", ttft, since, now.ttft_s, "more"),
    ]


def _change_of(
    name: str, unit: str, runs: Sequence[Timing], since: str, now: Timing, worse: Literal["more", "less"]
) -> Change:
    then = fmean(run.value for run in runs)
    noise = significance.unpaired(runs[-1].stddev, runs[-1].repeats, now.stddev, now.repeats)
    if len(runs) >= _ENOUGH_RUNS:
        noise = max(noise, significance.next_value([run.value for run in runs]))
    floor = _SPEED_FLOOR * then
    return Change(name, unit, then, since, now.value, floor, noise, worse, Outcome.TOO_SLOW, gated=False)


def speed_of(measured: Latency, run_id: str) -> Speed:
    """The decode rate and the time to first token of a run."""
    prompt, generation = measured.tests[0], measured.tests[-1]
    return Speed(
        run_id=run_id,
        decode_ts=_timing(generation.avg_ts, generation.stddev_ts, generation),
        ttft_s=_timing(measured.ttft_p50_s, prompt.stddev_ns / 1e9, prompt),
    )


def _timing(value: float, stddev: float, test: SpeedTest) -> Timing:
    return Timing(value=value, stddev=stddev, repeats=len(test.samples_ns))
