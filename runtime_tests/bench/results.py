"""One benchmark run as strict JSON with its raw samples, and the statistics of its repetitions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from pydantic import AliasChoices, Field

from export.architecture import Strict
from runtime_tests.evidence.record import Environment, Outcome, Slice

_Passes = tuple[tuple[int, int], ...]
"""(tokens, nanoseconds) of each pass."""
_ENOUGH = 3
"""Repetitions below which nothing is called faster or slower."""


class Timing(Strict):
    """What one child process measured."""

    load_ns: int
    first_ns: int
    """The first prompt after loading, when runtimes pack weights."""
    prompts: dict[int, _Passes]
    """By prompt length."""
    decode: _Passes
    far: _Passes
    """Generation after a long prompt; empty where none was timed."""
    peak_rss_bytes: int
    """Before the long prompt."""
    far_peak_rss_bytes: int
    """After it."""

    @property
    def ttft_s(self) -> float:
        """Seconds from the shortest prompt's tokens to its logits, warm."""
        return median(ns for _, ns in self.prompts[min(self.prompts)]) / 1e9

    def prefill_tps(self, length: int) -> float:
        """Prompt tokens per second."""
        return rate(self.prompts[length])

    @property
    def decode_tps(self) -> float:
        """Generated tokens per second."""
        return rate(self.decode)

    @property
    def far_decode_tps(self) -> float:
        """Generated tokens per second after the long prompt."""
        return rate(self.far)


@dataclass(frozen=True)
class Spread:
    """Repeated values: the median, and the range that holds eight of ten."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Ratio:
    """One thing over another, repetition by repetition: the median of the ratios and their quartiles."""

    median: float
    q1: float
    q3: float
    pairs: int

    @property
    def verdict(self) -> str:
        """Of rates, where more is better: a difference counts if three of four repetitions show it."""
        if self.pairs < _ENOUGH:
            return "too few repetitions"
        if self.q1 > 1:
            return "faster"
        return "slower" if self.q3 < 1 else "no clear difference"


class Sample(Strict):
    """One contender in one repetition."""

    contender: str
    repetition: int
    position: int
    """Place in the repetition's order."""
    load_average_1min: float
    """When it started."""
    outcome: Outcome
    detail: str
    timing: Timing | None


class Entry(Strict):
    """A contender as it took part."""

    name: str
    label: str
    ours: bool
    runtime: str
    size_bytes: int
    weight_bytes_per_token: int
    """Bytes of weights that every decoded token must read."""
    kv_bytes_per_position: int
    """Keys and values of one position, all layers."""
    against: tuple[str, ...]
    """Names of the stock contenders it is compared with."""
    made_by: str
    """The command; empty where `python -m export` made it."""
    tools: dict[str, str]


class Fidelity(Strict):
    """Logits of an artifact against the fp32 model, prefill and teacher-forced decode. KL in nats."""

    contender: str
    outcome: Outcome
    detail: str
    positions: int
    mean_kl: float
    p99_kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    by_domain: dict[str, Slice] | dict[str, float] = Field(validation_alias=AliasChoices("by_domain", "kl_by_domain"))
    """Of each kind of text in the evaluation; in runs of version 2 the mean KL alone, under another name."""

    @property
    def kl_by_domain(self) -> dict[str, float]:
        """Mean KL of each kind of text."""
        return {kind: part.mean_kl if isinstance(part, Slice) else part for kind, part in self.by_domain.items()}


class HostOverhead(Strict):
    """Single-token steps of one of our sessions: the time spent around the runtime's own calls."""

    label: str
    step_ns: tuple[int, ...]
    """Whole steps, tokens in to logits out."""
    runtime_ns: tuple[int, ...]
    """The runtime's calls inside the same steps."""

    @property
    def share(self) -> float:
        """Part of the steps' time that is not the runtime's."""
        return 1 - sum(self.runtime_ns) / sum(self.step_ns)

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        return median(self.step_ns) / 1e9

    @property
    def own_s(self) -> float:
        """Median seconds of our own code in a step."""
        return median(step - call for step, call in zip(self.step_ns, self.runtime_ns, strict=True)) / 1e9


class ExportCost(Strict):
    """One exporter as a whole process."""

    label: str
    command: str
    seconds: float
    peak_rss_bytes: int
    load_average_1min: float | None
    """When it started; null where it was not recorded."""


class Settings(Strict):
    """What every contender runs. Lengths in tokens."""

    threads: int
    context: int
    prompts: tuple[int, ...]
    generate: int
    passes: int
    repetitions: int
    far_prompt: int
    """Prompt before the generation at a long context; 0: not timed."""
    far_generate: int

    @property
    def near_position(self) -> int:
        """Positions in the cache at the middle of a generation."""
        return min(self.prompts) + self.generate // 2

    @property
    def far_position(self) -> int:
        """The same after the long prompt."""
        return self.far_prompt + self.far_generate // 2


class Benchmark(Strict):
    """One run."""

    schema_version: Literal[2, 3]
    run_id: str
    command: str
    model: str
    quant: str
    started_at: str
    """UTC, ISO 8601."""
    seconds: float
    commit: str
    dirty: bool | None
    environment: Environment
    load_average_after: float
    evaluation: str
    """Its text gives the prompts and the windows on which logits are compared."""
    checkpoint: str
    """A description of the weights, for people."""
    settings: Settings
    entries: tuple[Entry, ...]
    missing: dict[str, str]
    """Contender → why it did not take part."""
    samples: tuple[Sample, ...]
    read_bandwidth_bytes_per_s: tuple[float, ...]
    """Measured at the beginning of each repetition."""
    overheads: tuple[HostOverhead, ...]
    fidelity: tuple[Fidelity, ...]
    exports: tuple[ExportCost, ...]

    def values(self, contender: str, metric: Callable[[Timing], float]) -> dict[int, float]:
        """Repetition → value, of the repetitions that ran."""
        return {s.repetition: metric(s.timing) for s in self.samples if s.contender == contender and s.timing}

    def spread(self, contender: str, metric: Callable[[Timing], float]) -> Spread | None:
        """Median and spread over repetitions; None when none ran."""
        values = list(self.values(contender, metric).values())
        return spread(values) if values else None

    def ratio(self, ours: str, theirs: str, metric: Callable[[Timing], float]) -> Ratio | None:
        """Paired ratio of two contenders."""
        return ratio(self.values(ours, metric), self.values(theirs, metric))

    def bound_share(self, entry: Entry, metric: Callable[[Timing], float], position: int) -> Spread | None:
        """The rate as a share of the one that reading weights and cache allows, at the repetition's own bandwidth."""
        needed = entry.weight_bytes_per_token + position * entry.kv_bytes_per_position
        shares = [
            bound_share(
                tokens_per_s=rate, bytes_per_token=needed, bandwidth_bytes_per_s=self.read_bandwidth_bytes_per_s[i]
            )
            for i, rate in self.values(entry.name, metric).items()
        ]
        return spread(shares) if shares else None

    def fastest_decode_tps(self, contender: str) -> float | None:
        """Tokens per second of the single fastest pass, in the machine's quietest moment."""
        timings = [s.timing for s in self.samples if s.contender == contender and s.timing]
        return max((tokens * 1e9 / ns for timing in timings for tokens, ns in timing.decode), default=None)

    @property
    def failures(self) -> list[str]:
        """What did not run, one line each."""
        lines = [
            f"{s.contender}, repetition {s.repetition + 1}: {s.outcome.value}: {s.detail}"
            for s in self.samples
            if s.outcome is not Outcome.PASS
        ]
        return lines + [
            f"{f.contender}, logits: {f.outcome.value}: {f.detail}"
            for f in self.fidelity
            if f.outcome is not Outcome.PASS
        ]


def spread(values: Sequence[float]) -> Spread:
    """Median, p10 and p90, interpolated between values."""
    p10, middle, p90 = np.quantile(values, (0.1, 0.5, 0.9))
    return Spread(float(middle), float(p10), float(p90))


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Ratio | None:
    """Ratios of the repetitions that both have, so that a slow repetition cancels out; None where they share none."""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    q1, middle, q3 = np.quantile([ours[i] / theirs[i] for i in both], (0.25, 0.5, 0.75))
    return Ratio(float(middle), float(q1), float(q3), len(both))


def rate(passes: _Passes) -> float:
    """Tokens per second, the median of the passes."""
    return median(tokens * 1e9 / ns for tokens, ns in passes)


def bound_share(*, tokens_per_s: float, bytes_per_token: float, bandwidth_bytes_per_s: float) -> float:
    """The rate as a share of the one that reading alone would allow."""
    return tokens_per_s * bytes_per_token / bandwidth_bytes_per_s


def append(benchmark: Benchmark, path: Path) -> None:
    """Add one line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(benchmark.model_dump_json() + "\n")
