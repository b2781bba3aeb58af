"""A run against the baseline: what grew, got worse or slower, beyond what the two runs' own noise explains.

Pure; knows nothing about files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Literal

from scipy.stats import t as student_t

from export.plan import Strict

from . import gates
from .record import Comparison, Gate, Latency, Outcome, PlanKey, SpeedTest, Verdict

SIZE_FLOOR = 0.01
"""Of the baseline's size. Builds are byte-identical, so a size has no noise; other tool versions move a few bytes."""
KL_FLOOR = 0.05
"""Of the baseline's KL."""
KL_FLOOR_NATS = 1e-4
"""Where almost nothing is lost, several times almost nothing is as good."""
SPEED_FLOOR = 0.10
"""Of the baseline's rate or time. A difference below it is nothing, however steady the timings."""
BLIND = 2.0
"""Times the floor: noise above it hides what a comparison should find."""
ENOUGH_RUNS = 3
"""From so many runs on, how much they differ is noise as well: a machine's slow day shows in no single run."""
HIDDEN = ": so much noise hides what a change does"
"""At the end of what a gate says that only the noise between two or more runs leaves open."""
AGAINST = " against baseline, "
"""In the name of every gate made here, before its unit."""


class Timing(Strict):
    """One timing as it is compared."""

    value: float
    stddev: float
    repeats: int


class Speed(Strict):
    """One run: tokens per second and seconds."""

    run_id: str
    decode_ts: Timing
    ttft_s: Timing


class Reached(Strict):
    """What one artifact reached once."""

    run_id: str
    commit: str
    plan_key: PlanKey
    size_bytes: int
    mean_kl: float
    """As shipped, nats."""
    kl_by_window: tuple[float, ...]
    speeds: tuple[Speed, ...]
    """Of steady runs, newest last; empty: not timed, or too noisy to be judged."""


@dataclass(frozen=True)
class Change:
    """One number of the baseline and of this run; all in its unit."""

    name: str
    unit: str
    before: float
    since: str
    """Which run or runs the baseline's number is of."""
    now: float
    floor: float
    """A difference below it is nothing."""
    noise: float
    """Half the 95 % interval of the difference."""
    worse: Literal["more", "less"]
    fails_as: Outcome

    @property
    def worse_by(self) -> float:
        """Negative: better."""
        return self.now - self.before if self.worse == "more" else self.before - self.now

    @property
    def tolerance(self) -> float:
        """The most it may be worse by."""
        return max(self.floor, self.noise)

    @property
    def verdict(self) -> Verdict:
        """Fail: worse beyond noise. Inconclusive: too noisy to see a loss of twice the floor, and one is possible."""
        if not self.worse_by <= self.tolerance:  # NaN is never within it
            return "fail"
        seen = BLIND * self.floor
        return "inconclusive" if self.noise > seen and self.worse_by + self.noise > seen else "pass"


def judge(change: Change) -> Gate:
    """A change as a gate of the record."""
    more = change.worse == "more"
    limit = change.before + (change.tolerance if more else -change.tolerance)
    detail = f"{change.before:.4g} in {change.since}, tolerance {change.tolerance:.2g}"
    if change.verdict == "inconclusive":
        detail += HIDDEN
    name = f"{change.name}{AGAINST}{change.unit}"
    rule: gates.Rule = "at most" if more else "at least"
    gate = gates.judge(name, change.now, rule, limit, change.fails_as, detail)
    return gate.model_copy(update={"verdict": change.verdict})


def shipped(size_bytes: int, total: Comparison, before: Reached) -> list[Change]:
    """What the file is: its size, and its KL as shipped."""
    a, b, run = before.size_bytes / 1e6, size_bytes / 1e6, f"run {before.run_id}"
    floor = max(KL_FLOOR * before.mean_kl, KL_FLOOR_NATS)
    noise = paired_noise(before.kl_by_window, total.kl_by_window)
    return [
        Change("size", "MB", a, run, b, SIZE_FLOOR * a, 0.0, "more", Outcome.TOO_LARGE),
        Change("KL as shipped", "nats", before.mean_kl, run, total.mean_kl, floor, noise, "more", Outcome.MISMATCH),
    ]


def timed(measured: Latency, before: Reached) -> list[Change]:
    """Decode rate and time to first token; nothing where the baseline has no speed."""
    if not before.speeds:
        return []
    now, runs = speed_of(measured, ""), before.speeds
    since = f"run {runs[0].run_id}" if len(runs) == 1 else f"{len(runs)} runs, their mean"
    decode, ttft = [run.decode_ts for run in runs], [run.ttft_s for run in runs]
    return [
        change_of("decode", "tokens/s", decode, since, now.decode_ts, "less"),
        change_of("time to first token", "s", ttft, since, now.ttft_s, "more"),
    ]


def change_of(
    name: str, unit: str, runs: Sequence[Timing], since: str, now: Timing, worse: Literal["more", "less"]
) -> Change:
    """A timing and those of the runs before it."""
    then = fmean(run.value for run in runs)
    noise = max(noise_of_difference(runs[-1], now), noise_between([run.value for run in runs]))
    return Change(name, unit, then, since, now.value, SPEED_FLOOR * then, noise, worse, Outcome.TOO_SLOW)


def speed_of(measured: Latency, run_id: str) -> Speed:
    """What a baseline keeps of timings."""
    prompt, generation = measured.tests[0], measured.tests[-1]
    return Speed(
        run_id=run_id,
        decode_ts=timing(generation.avg_ts, generation.stddev_ts, generation),
        ttft_s=timing(measured.ttft_p50_s, prompt.stddev_ns / 1e9, prompt),
    )


def timing(value: float, stddev: float, test: SpeedTest) -> Timing:
    """With the number of its samples."""
    return Timing(value=value, stddev=stddev, repeats=len(test.samples_ns))


def paired_noise(before: Sequence[float], now: Sequence[float]) -> float:
    """Half the 95 % interval of the mean difference over the same windows (Student's t); one window shows no noise."""
    differences = [b - a for a, b in zip(before, now, strict=True)]
    count = len(differences)
    return float(student_t.ppf(0.975, count - 1)) * stdev(differences) / sqrt(count) if count > 1 else 0.0


def noise_of_difference(a: Timing, b: Timing) -> float:
    """Half the 95 % interval of the difference of two means of unequal spread (Welch's t)."""
    variances = [one.stddev**2 / one.repeats for one in (a, b)]
    if not sum(variances):
        return 0.0
    spread = sum(v**2 / (one.repeats - 1) for v, one in zip(variances, (a, b), strict=True))
    return float(student_t.ppf(0.975, sum(variances) ** 2 / spread)) * sqrt(sum(variances))


def noise_between(values: Sequence[float]) -> float:
    """Half the 95 % prediction interval of one more run, from how much the runs before differ; few runs show none."""
    count = len(values)
    if count < ENOUGH_RUNS:
        return 0.0
    return float(student_t.ppf(0.975, count - 1)) * stdev(values) * sqrt(1 + 1 / count)
