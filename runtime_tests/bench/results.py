"""One benchmark run as strict JSON, raw samples kept. Knows nothing about how they were measured or are shown."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Literal

from export.plan import Strict

from ..record import Environment, Outcome
from .ratios import Ratio, Spread, ratio, spread

Passes = tuple[tuple[int, int], ...]
"""(tokens, nanoseconds) of each pass."""


class Timing(Strict):
    """What one child process measured."""

    load_ns: int
    first_ns: int
    """The first prompt after loading, when runtimes pack weights."""
    prompts: dict[int, Passes]
    """By prompt length."""
    decode: Passes
    peak_rss_bytes: int

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


def rate(passes: Passes) -> float:
    """Tokens per second, the median of the passes."""
    return median(tokens * 1e9 / ns for tokens, ns in passes)


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


class ExportCost(Strict):
    """One exporter as a whole process."""

    label: str
    command: str
    seconds: float
    peak_rss_bytes: int
    load_average_1min: float | None
    """When it started; null where it was not noted."""


class Settings(Strict):
    """What was asked of every contender. Lengths in tokens."""

    threads: int
    context: int
    prompts: tuple[int, ...]
    generate: int
    passes: int
    repetitions: int


class Benchmark(Strict):
    """One run."""

    schema_version: Literal[1]
    run_id: str
    command: str
    model: str
    quant: str
    started_at: str
    """UTC, ISO 8601."""
    seconds: float
    commit: str
    dirty: bool
    environment: Environment
    load_average_after: float
    settings: Settings
    entries: tuple[Entry, ...]
    missing: dict[str, str]
    """Peer → why it did not take part."""
    samples: tuple[Sample, ...]
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

    def fastest_decode_tps(self, contender: str) -> float | None:
        """Tokens per second of the single fastest pass: what the machine gives in its quietest moment."""
        found = [s.timing.decode for s in self.samples if s.contender == contender and s.timing]
        return max((tokens * 1e9 / ns for passes in found for tokens, ns in passes), default=None)

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


def append(benchmark: Benchmark, path: Path) -> None:
    """Add one line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(benchmark.model_dump_json() + "\n")
