"""What quantization costs on each kind of text, as rows of text. Shows nothing itself."""

from statistics import mean

from .results import Benchmark, Fidelity
from .table_text import Row


def domains(run: Benchmark) -> list[Row]:
    """Header and a row per artifact that was judged on several kinds of text: mean KL to the fp32 model, best first."""
    judged = [found for found in run.fidelity if len(found.kl_by_domain) > 1]
    if not judged:
        return []
    kinds = list(judged[0].kl_by_domain)
    header: Row = ("artifact", "runtime", "MB", "KL, mean of all kinds", *kinds, "top-1")
    return [header, *(row(run, found, kinds) for found in sorted(judged, key=overall))]


def overall(found: Fidelity) -> float:
    """Every kind counts alike, however many tokens it has."""
    return mean(found.kl_by_domain.values())


def row(run: Benchmark, found: Fidelity, kinds: list[str]) -> Row:
    """One artifact."""
    entry = next(entry for entry in run.entries if entry.name == found.contender)
    by_kind = (f"{found.kl_by_domain[kind]:.4f}" for kind in kinds)
    size = f"{entry.size_bytes / 1e6:.1f}"
    return entry.label, entry.runtime, size, f"{overall(found):.4f}", *by_kind, f"{found.top1:.1%}"
