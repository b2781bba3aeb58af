"""What quantization costs on each kind of text, as rows of text. Shows nothing itself."""

from collections.abc import Sequence
from statistics import mean
from typing import Protocol

from .results import Benchmark, Fidelity
from .table_text import Row


class Rated(Protocol):
    """A file that was judged."""

    @property
    def label(self) -> str:
        """Whose it is."""

    @property
    def runtime(self) -> str:
        """What ran it."""

    @property
    def size_bytes(self) -> int:
        """Of the model."""

    @property
    def fidelity(self) -> Fidelity:
        """How far it is."""


class Line:
    """A contender of a benchmark as a rated file."""

    def __init__(self, run: Benchmark, found: Fidelity) -> None:
        entry = next(entry for entry in run.entries if entry.name == found.contender)
        self.label, self.runtime, self.size_bytes, self.fidelity = entry.label, entry.runtime, entry.size_bytes, found


def domains(run: Benchmark) -> list[Row]:
    """Header and a row per artifact of a benchmark that was judged on several kinds of text."""
    return rows([Line(run, found) for found in run.fidelity if len(found.kl_by_domain) > 1])


def rows(rated: Sequence[Rated]) -> list[Row]:
    """Header and a row per file: mean KL to the fp32 model, least first; empty when nothing was judged."""
    judged = [one for one in rated if one.fidelity.kl_by_domain]
    if not judged:
        return []
    kinds = list(judged[0].fidelity.kl_by_domain)
    header: Row = ("artifact", "runtime", "MB", "KL, mean of all kinds", *kinds, "top-1")
    return [header, *(row(one, kinds) for one in sorted(judged, key=lambda one: overall(one.fidelity)))]


def overall(found: Fidelity) -> float:
    """Every kind counts alike, however many tokens it has."""
    return mean(found.kl_by_domain.values())


def row(one: Rated, kinds: Sequence[str]) -> Row:
    """One file."""
    found = one.fidelity
    by_kind = (f"{found.kl_by_domain[kind]:.4f}" for kind in kinds)
    return one.label, one.runtime, f"{one.size_bytes / 1e6:.1f}", f"{overall(found):.4f}", *by_kind, f"{found.top1:.1%}"
