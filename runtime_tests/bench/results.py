"""One benchmark run as strict JSON, raw samples kept. Knows nothing about how they were measured or are shown."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import AliasChoices, Field

from export.plan import Strict

from ..record import Environment, Outcome, Slice
from .ratios import Ratio, Spread, ratio, spread
from .timing import Timing
from .traffic import bound_share


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
    """Stored weights that every decoded token must read."""
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
    """Single-token steps of one of our sessions: what is spent around the runtime's own call."""

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
    """When it started; null where it was not noted."""


class Settings(Strict):
    """What was asked of every contender. Lengths in tokens."""

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
    dirty: bool
    environment: Environment
    load_average_after: float
    evaluation: str
    """Whose text the prompts are, and what logits were compared on."""
    checkpoint: str
    """What the weights are, for people."""
    settings: Settings
    entries: tuple[Entry, ...]
    missing: dict[str, str]
    """Peer → why it did not take part."""
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
        """Rate over what reading weights and cache would allow, with the bandwidth of the same repetition."""
        needed = entry.weight_bytes_per_token + position * entry.kv_bytes_per_position
        shares = [
            bound_share(
                tokens_per_s=rate, bytes_per_token=needed, bandwidth_bytes_per_s=self.read_bandwidth_bytes_per_s[i]
            )
            for i, rate in self.values(entry.name, metric).items()
        ]
        return spread(shares) if shares else None

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
