"""Two artifacts in one line: `+3.1 MB, decode −4 % ± 2 %, KL 0.031 → 0.029, 12 layers changed`. Pure."""

from collections.abc import Iterator, Mapping

from .measured import Measured, SpeedTest

Runs = Mapping[str, tuple[Measured, Measured]]
"""Device → the newest run of A and of B on it."""

HOLDS = {"pass", "inconclusive"}


def headline(a_bytes: int, b_bytes: int, changed_layers: int | None, runs: Runs) -> str:
    """What a reader of a pull request wants first; null `changed_layers`: weights were not compared."""
    parts = [size(b_bytes - a_bytes)]
    for device, (a, b) in runs.items():
        where = f" on {device}" if len(runs) > 1 else ""
        parts += [f"{part}{where}" for part in measured(a, b)]
    return ", ".join([*parts, *layers(changed_layers)])


def size(change_bytes: int) -> str:
    """`+3.1 MB`, `−120 bytes`, `same size`."""
    if not change_bytes:
        return "same size"
    if abs(change_bytes) < 10_000:
        return minus(f"{change_bytes:+,} bytes")
    digits = 1 if abs(change_bytes) >= 1e6 else 2
    return minus(f"{change_bytes / 1e6:+.{digits}f} MB")


def measured(a: Measured, b: Measured) -> Iterator[str]:
    """Decode rate with the 95 % interval of its change, KL as shipped, the verdicts where one is a failure."""
    if a.timed and b.timed and a.environment == b.environment:
        assert a.latency is not None
        assert b.latency is not None
        yield f"decode {rate(a.latency.tests[-1], b.latency.tests[-1])}"
    if a.accuracy.total and b.accuracy.total:
        yield f"KL {a.accuracy.total.mean_kl:.3g} → {b.accuracy.total.mean_kl:.3g}"
    if a.outcome != b.outcome and not {a.outcome, b.outcome} <= HOLDS:
        yield f"verdict {a.outcome} → {b.outcome}"


def rate(a: SpeedTest, b: SpeedTest) -> str:
    """`−4 % ± 2 %`, as shares of A's rate (Welch's t)."""
    percent = round(100 * (b.avg_ts / a.avg_ts - 1))
    return minus(f"{percent:+d} %") + f" ± {100 * interval(a, b) / a.avg_ts:.0f} %"


def interval(a: SpeedTest, b: SpeedTest) -> float:
    """Half the 95 % interval of the difference of two rates, tokens/s; 0 where no repeat differs from another."""
    from scipy.stats import ttest_ind

    if not a.stddev_ts and not b.stddev_ts:
        return 0.0
    found = ttest_ind(a.samples_ts, b.samples_ts, equal_var=False).confidence_interval(0.95)
    return float(found.high - found.low) / 2


def layers(changed: int | None) -> list[str]:
    """How many quantized weights have another scheme or other numbers."""
    if changed is None:
        return []
    return [f"{changed} layer{'s' if changed > 1 else ''} changed" if changed else "no layer changed"]


def minus(text: str) -> str:
    """A sign as wide as the plus."""
    return text.replace("-", "−")
