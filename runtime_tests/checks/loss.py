"""Tables of the loss in each domain and position range of an artifact's comparisons."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from runtime_tests.evidence.record import Accuracy, Comparison, Record, Slice

COMPARISONS = {
    "total": "As shipped: Transformers fp32 → file",
    "quantization": "Quantization: fp32 → quantized model",
    "lowering": "Lowering: quantized model → file",
    "cache": "Cache: quantized model, float32 cache → file, in the 64 tokens before each place",
    "noise": "Float noise: quantized model → itself, one ulp off",
    "rewriting": "Rewriting: Transformers fp32 → our fp32",
}
"""Field of `Accuracy` → title; users ask for the first one first."""
COLUMNS = ("positions", "KL", "KL p99", "top-1", "perplexity", "of reference")


class _Cell(NamedTuple):
    """A number ready to print; `heat` is its share of the largest loss on the page, 0 to 1."""

    text: str
    heat: float


class _Row(NamedTuple):
    label: str
    kind: str
    """`all`, `domain` or `position`."""
    cells: tuple[_Cell, ...]


class _Table(NamedTuple):
    title: str
    rows: tuple[_Row, ...]


def worst(parts: Mapping[str, Slice]) -> tuple[str, Slice]:
    """Label and numbers of the slice with the largest mean KL."""
    return max(parts.items(), key=lambda item: item[1].mean_kl)


def measured(accuracy: Accuracy) -> dict[str, Comparison]:
    """The comparisons that a run reached, by title."""
    reached: dict[str, Comparison | None] = {title: getattr(accuracy, name) for name, title in COMPARISONS.items()}
    return {title: comparison for title, comparison in reached.items() if comparison}


def tables(records: Sequence[Record]) -> list[list[_Table]]:
    """The tables of each record, with one scale of heat for all of them."""
    comparisons = [measured(record.accuracy) for record in records]
    losses = [_losses(part) for titled in comparisons for each in titled.values() for _, _, part in parts(each)]
    largest = tuple(map(max, zip(*losses, strict=True))) if losses else (0.0,) * 3
    return [
        [
            _Table(title, tuple(_Row(label, kind, cells(part, largest)) for kind, label, part in parts(comparison)))
            for title, comparison in titled.items()
        ]
        for titled in comparisons
    ]


def parts(comparison: Comparison) -> Iterator[tuple[str, str, Slice]]:
    """Kind, label and numbers: all positions, then every domain, then every range."""
    yield "all", "all", comparison
    yield from (("domain", label, part) for label, part in comparison.by_domain.items())
    yield from (("position", label, part) for label, part in comparison.by_position.items())


def _losses(part: Slice) -> tuple[float, float, float]:
    """KL, its p99 and top-1 disagreement, all zero where nothing is lost."""
    return part.mean_kl, part.p99_kl, 1 - part.top1


def cells(part: Slice, largest: Sequence[float]) -> tuple[_Cell, ...]:
    """One row's numbers in the order of COLUMNS."""
    heat = [value / most if most else 0.0 for value, most in zip(_losses(part), largest, strict=True)]
    return (
        _Cell(f"{part.positions:,}", 0.0),
        _Cell(nats(part.mean_kl), heat[0]),
        _Cell(nats(part.p99_kl), heat[1]),
        _Cell(f"{part.top1:.1%}", heat[2]),
        _Cell(perplexity(part.perplexity), 0.0),
        _Cell(perplexity(part.reference_perplexity), 0.0),
    )


def nats(value: float) -> str:
    """A KL: `0.373`, `3.2e-03`, `0`."""
    small = f"{value:.1e}" if value else "0"
    return f"{value:.3f}" if value >= 0.01 else small


def perplexity(value: float) -> str:
    """`12.34`, without decimals where they would mean nothing."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"
