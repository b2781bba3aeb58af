"""One benchmark run as strict JSON with its raw samples, and the statistics of its repetitions."""

from collections.abc import Callable, Collection, Mapping
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
from pydantic import AliasChoices, Field

from export.architecture import Strict
from export.manifest import Commit
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

    def ttft_s(self) -> float:
        """Seconds from the shortest prompt's tokens to its logits, warm."""
        return median(ns for _, ns in self.prompts[min(self.prompts)]) / 1e9

    def prefill_tps(self, length: int) -> float:
        """Prompt tokens per second."""
        return _rate(self.prompts[length])

    def decode_tps(self) -> float:
        """Generated tokens per second."""
        return _rate(self.decode)

    def far_decode_tps(self) -> float:
        """Generated tokens per second after the long prompt."""
        return _rate(self.far)


Metric = Callable[[Timing], float]


class Spread(NamedTuple):
    """Values of repetitions: their median, and two quantiles beside it."""

    median: float
    low: float
    high: float
    repetitions: int

    def text(self, digits: int) -> str:
        """`12.3 (11.9–12.8)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"

    @property
    def verdict(self) -> str:
        """Of ratios of rates, with their quartiles: a difference counts if three of four repetitions show it."""
        if self.repetitions < _ENOUGH:
            return "too few repetitions"
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no clear difference"


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


class File(Strict):
    """An artifact, ours or another exporter's, in a runtime."""

    label: str
    runtime: str
    size_bytes: int
    ours: bool


class Entry(File):
    """A contender as it took part."""

    name: str
    weight_bytes_per_token: int
    """Bytes of weights that every decoded token must read."""
    kv_bytes_per_position: int
    """Keys and values of one position, all layers."""
    against: tuple[str, ...]
    """Names of the stock contenders it is compared with."""
    made_by: str
    """The command; empty where `python -m export` made it."""
    tools: dict[str, str]


class Fidelity(Slice):
    """Logits of an artifact against the fp32 model, prefill and teacher-forced decode; zeros where it did not run."""

    contender: str
    outcome: Outcome
    detail: str
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


class Cost(Strict):
    """One exporter as a whole process."""

    command: str
    seconds: float
    peak_rss_bytes: int
    load_average_1min: float | None
    """When it started; null where it was not recorded."""


class ExportCost(Cost):
    """With the exporter's name."""

    label: str


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
    commit: Commit
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

    def values(self, contender: str, metric: Metric) -> dict[int, float]:
        """Repetition → value, of the repetitions that ran."""
        return {s.repetition: metric(s.timing) for s in self.samples if s.contender == contender and s.timing}

    def spread(self, contender: str, metric: Metric) -> Spread | None:
        """Over repetitions; None when none ran."""
        return spread(self.values(contender, metric).values())

    def ratio(self, ours: str, theirs: str, metric: Metric) -> Spread | None:
        """Paired ratio of two contenders."""
        return ratio(self.values(ours, metric), self.values(theirs, metric))

    def bound_share(self, entry: Entry, metric: Metric, position: int) -> Spread | None:
        """The rate as a share of the one that reading weights and cache allows, at the repetition's own bandwidth."""
        needed = entry.weight_bytes_per_token + position * entry.kv_bytes_per_position
        rates = self.values(entry.name, metric)
        return spread([rate * needed / self.read_bandwidth_bytes_per_s[i] for i, rate in rates.items()])

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


class StudyRun(Strict):
    """What every study records: of losses, without timings."""

    model: str
    evaluation: str
    environment: Environment
    commit: Commit
    tools: dict[str, str]


def spread(values: Collection[float], low: float = 0.1, high: float = 0.9) -> Spread | None:
    """The median, p10 and p90 or other quantiles, interpolated between values; None where there are none."""
    if not values:
        return None
    middle, lower, upper = np.quantile(list(values), (0.5, low, high)).tolist()
    return Spread(middle, lower, upper, len(values))


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """Ratios of the repetitions that both have, so that a slow repetition cancels out, with their quartiles."""
    return spread([ours[i] / theirs[i] for i in sorted(ours.keys() & theirs.keys())], 0.25, 0.75)


def _rate(passes: _Passes) -> float:
    """Tokens per second, the median of the passes."""
    return median(tokens * 1e9 / ns for tokens, ns in passes)
