"""What validation measured of an artifact, out of its records, whose other fields are not read."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from . import manifest


class Some(BaseModel):
    """Fields of a larger record."""

    model_config = ConfigDict(frozen=True)


class Comparison(Some):
    """Two models on the same text; nats."""

    mean_kl: float
    top1: float


class Accuracy(Some):
    """Null where validation ended before."""

    total: Comparison | None
    """As shipped."""
    quantization: Comparison | None
    lowering: Comparison | None


class SpeedTest(Some):
    """`n_prompt` 0: decoding."""

    n_prompt: int
    n_gen: int
    avg_ts: float
    """Tokens per second."""
    stddev_ts: float
    samples_ts: tuple[float, ...]


class Latency(Some):
    """Timings of one run."""

    tests: tuple[SpeedTest, ...]
    peak_rss_bytes: int


class Environment(Some):
    """The machine; how fast something is means nothing on another one."""

    cpu: str
    cores: int

    def __str__(self) -> str:
        return f"{self.cpu}, {self.cores} cores"


class Measured(Some):
    """One run of validation."""

    manifest_sha256: str
    device: str
    environment: Environment
    emulated: bool
    started_at: str
    outcome: str
    accuracy: Accuracy
    latency: Latency | None

    @property
    def timed(self) -> bool:
        """Whether its timings mean something."""
        return self.latency is not None and not self.emulated

    def losses(self) -> dict[str, float]:
        """KL and top-1 of every step that was reached, under the names they are shown with."""
        of = self.accuracy
        steps = {"as shipped": of.total, "of quantization": of.quantization, "of lowering": of.lowering}
        found: dict[str, float] = {}
        for what, one in steps.items():
            found |= {f"KL {what}, nats": one.mean_kl, f"top-1 {what}": one.top1} if one else {}
        return found

    def numbers(self) -> dict[str, float]:
        """Everything comparable on one machine; no timings of an emulated device."""
        found = self.losses()
        if self.latency and self.timed:
            for test in self.latency.tests:
                what = f"prefill of {test.n_prompt}" if test.n_prompt else f"decode of {test.n_gen}"
                found[f"{what}, tokens/s"] = test.avg_ts
            found["peak memory, MB"] = self.latency.peak_rss_bytes / 1e6
        return found


def newest(folder: Path, records: Sequence[Path]) -> dict[str, Measured]:
    """Device → the last run on exactly this artifact, found by the hash of its manifest. Lines of others are passed."""
    digest = hashlib.sha256((folder / manifest.FILE).read_bytes()).hexdigest()
    found: dict[str, Measured] = {}
    for line in lines(records):
        if digest not in line:
            continue
        try:
            one = Measured.model_validate_json(line)
        except ValidationError:  # another version of the records: nothing to show
            continue
        before = found.get(one.device)
        if one.manifest_sha256 == digest and (before is None or before.started_at <= one.started_at):
            found[one.device] = one
    return found


def lines(records: Sequence[Path]) -> Iterator[str]:
    """Every line of these files, those that exist."""
    for path in records:
        if path.is_file():
            yield from path.read_text(encoding="utf-8").splitlines()
