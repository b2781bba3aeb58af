"""What validation measured of an artifact, out of its records, whose other fields are not read."""

import hashlib
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

    quantization: Comparison | None
    lowering: Comparison | None


class SpeedTest(Some):
    """`n_prompt` 0: decoding."""

    n_prompt: int
    n_gen: int
    avg_ts: float
    """Tokens per second."""


class Latency(Some):
    """Timings of one run."""

    tests: tuple[SpeedTest, ...]
    peak_rss_bytes: int


class Measured(Some):
    """One run of validation."""

    manifest_sha256: str
    device: str
    emulated: bool
    started_at: str
    outcome: str
    accuracy: Accuracy
    latency: Latency | None

    def numbers(self) -> dict[str, float]:
        """Everything comparable under the name it is shown with; no timings of an emulated device."""
        found: dict[str, float] = {}
        for what, one in (("quantization", self.accuracy.quantization), ("lowering", self.accuracy.lowering)):
            found |= {f"KL of {what}, nats": one.mean_kl, f"top-1 of {what}": one.top1} if one else {}
        if self.latency and not self.emulated:
            for test in self.latency.tests:
                what = f"prefill of {test.n_prompt}" if test.n_prompt else f"decode of {test.n_gen}"
                found[f"{what}, tokens/s"] = test.avg_ts
            found["peak memory, MB"] = self.latency.peak_rss_bytes / 1e6
        return found


def newest(folder: Path, records: Path) -> dict[str, Measured]:
    """Device → the last run on exactly this artifact, found by the hash of its manifest. Lines of others are passed."""
    digest = hashlib.sha256((folder / manifest.FILE).read_bytes()).hexdigest()
    found = {}
    for line in records.read_text(encoding="utf-8").splitlines() if records.is_file() else ():
        if digest not in line:
            continue
        try:
            one = Measured.model_validate_json(line)
        except ValidationError:  # another version of the records: nothing to show
            continue
        if one.manifest_sha256 == digest:
            found[one.device] = one
    return found
