"""The part of validation's record that `diff` reads, on which the whole record is built.

Records of other versions are read too, whatever other fields they have.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from export import manifest
from export.manifest import Sha256
from export.plan import Name

INCONCLUSIVE = "inconclusive"
"""The outcome of a run whose timings were too noisy to judge."""
_HOLDS = ("pass", INCONCLUSIVE)


class Part(BaseModel):
    """Fields of a larger record."""

    model_config = ConfigDict(frozen=True)


class Loss(Part):
    """One model against another on the same text; KL in nats."""

    mean_kl: float
    top1: float


class Losses(Part):
    """Null where validation ended before a comparison."""

    total: Loss | None
    """Hugging Face fp32 → the artifact as shipped: the whole loss."""
    quantization: Loss | None
    """Our fp32 → our quantized model."""
    lowering: Loss | None
    """Our quantized model → the artifact in its runtime."""


class Rate(Part):
    """Repeats of one timing, with llama-bench's field names. `n_gen` 0: a prompt; else generation."""

    n_prompt: int
    n_gen: int
    avg_ts: float
    """Tokens per second."""
    stddev_ts: float
    samples_ts: tuple[float, ...]


class Timings(Part):
    """Speed and memory of one run."""

    tests: tuple[Rate, ...]
    peak_rss_bytes: int


class Machine(Part):
    """Timings are comparable on the same machine only."""

    cpu: str
    cores: int

    def __str__(self) -> str:
        return f"{self.cpu}, {self.cores} cores"


class Validation(Part):
    """One artifact, one run."""

    manifest_sha256: Sha256
    device: Name
    emulated: bool
    """Its results count, its timings do not."""
    environment: Machine
    started_at: str
    """UTC, ISO 8601."""
    accuracy: Losses
    latency: Timings | None
    outcome: str

    @property
    def timed(self) -> bool:
        """Whether it has timings that count."""
        return self.latency is not None and not self.emulated

    @property
    def holds(self) -> bool:
        """No gate failed and no process crashed."""
        return self.outcome in _HOLDS

    def losses(self) -> dict[str, float]:
        """Label → KL and top-1 agreement of every comparison that was made."""
        accuracy = self.accuracy
        steps = {
            "as shipped": accuracy.total, "of quantization": accuracy.quantization, "of lowering": accuracy.lowering
        }  # fmt: skip
        numbers: dict[str, float] = {}
        for step, loss in steps.items():
            numbers |= {f"KL {step}, nats": loss.mean_kl, f"top-1 {step}": loss.top1} if loss else {}
        return numbers

    def numbers(self) -> dict[str, float]:
        """Label → everything that can be compared on one machine; no timings of an emulated device."""
        numbers = self.losses()
        if self.latency and self.timed:
            for test in self.latency.tests:
                phase = f"prefill of {test.n_prompt}" if test.n_prompt else f"decode of {test.n_gen}"
                numbers[f"{phase}, tokens/s"] = test.avg_ts
            numbers["peak memory, MB"] = self.latency.peak_rss_bytes / 1e6
        return numbers


def newest(folder: Path, records: Sequence[Path]) -> dict[str, Validation]:
    """Device → the last run of exactly this artifact, by the hash of its manifest."""
    digest = manifest.digest(folder)
    by_device: dict[str, Validation] = {}
    for line in (line for path in records for line in lines(path) if digest in line):
        try:
            run = Validation.model_validate_json(line)
        except ValidationError:  # a version of records without the fields needed
            continue
        before = by_device.get(run.device)
        if run.manifest_sha256 == digest and (before is None or before.started_at <= run.started_at):
            by_device[run.device] = run
    return by_device


def lines(path: Path) -> Iterator[str]:
    """Every line of a records file, which may be missing."""
    if path.is_file():
        # not splitlines(): a text in a record may hold other line separators
        yield from path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
