"""What was lost where, as text: every domain and position range of an artifact's comparisons. Measures nothing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .record import Accuracy, Comparison, Record, Slice

COMPARISONS = {
    "total": "As shipped: Transformers fp32 → file",
    "quantization": "Quantization: fp32 → quantized model",
    "lowering": "Lowering: quantized model → file",
    "noise": "Float noise: quantized model → itself, one ulp off",
    "rewriting": "Rewriting: Transformers fp32 → our fp32",
}
"""Field of `Accuracy` → title, the one that users ask for first."""
COLUMNS = ("positions", "KL", "KL p99", "top-1", "perplexity", "of reference")


class Cell(NamedTuple):
    """A number ready to print; `heat` is its share of the largest loss on the page, 0 to 1."""

    text: str
    heat: float


class Row(NamedTuple):
    """One slice."""

    label: str
    kind: str
    """`all`, `domain` or `position`."""
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    """One comparison."""

    title: str
    rows: tuple[Row, ...]


def worst(parts: Mapping[str, Slice]) -> tuple[str, Slice]:
    """Label and numbers of the slice with the largest mean KL."""
    return max(parts.items(), key=lambda item: item[1].mean_kl)


def measured(accuracy: Accuracy) -> dict[str, Comparison]:
    """Title → comparison, of those that the run reached."""
    found: dict[str, Comparison | None] = {title: getattr(accuracy, name) for name, title in COMPARISONS.items()}
    return {title: one for title, one in found.items() if one}


def tables(records: Sequence[Record]) -> list[list[Table]]:
    """The tables of each record, with heat that means the same in all of them."""
    largest = heaviest(
        [part for record in records for one in measured(record.accuracy).values() for _, _, part in parts(one)]
    )
    return [
        [
            Table(title, tuple(Row(label, kind, cells(part, largest)) for kind, label, part in parts(one)))
            for title, one in measured(record.accuracy).items()
        ]
        for record in records
    ]


def parts(one: Comparison) -> Iterator[tuple[str, str, Slice]]:
    """Kind, label and numbers: all positions, then every domain, then every range."""
    yield "all", "all", one
    yield from (("domain", label, part) for label, part in one.by_domain.items())
    yield from (("position", label, part) for label, part in one.by_position.items())


def losses(part: Slice) -> tuple[float, float, float]:
    """What is zero where nothing is lost, in the order of the columns: KL, its p99, top-1 disagreement."""
    return part.mean_kl, part.p99_kl, 1 - part.top1


def heaviest(found: Sequence[Slice]) -> tuple[float, ...]:
    """The largest of each loss."""
    return tuple(map(max, zip(*(losses(part) for part in found), strict=True))) if found else (0.0,) * 3


def cells(part: Slice, largest: Sequence[float]) -> tuple[Cell, ...]:
    """One row's numbers in the order of COLUMNS."""
    heat = [value / most if most else 0.0 for value, most in zip(losses(part), largest, strict=True)]
    return (
        Cell(f"{part.positions:,}", 0.0),
        Cell(nats(part.mean_kl), heat[0]),
        Cell(nats(part.p99_kl), heat[1]),
        Cell(f"{part.top1:.1%}", heat[2]),
        Cell(perplexity(part.perplexity), 0.0),
        Cell(perplexity(part.reference_perplexity), 0.0),
    )


def nats(value: float) -> str:
    """A KL: `0.373`, `3.2e-03`, `0`."""
    small = f"{value:.1e}" if value else "0"
    return f"{value:.3f}" if value >= 0.01 else small


def perplexity(value: float) -> str:
    """`12.34`, without decimals where they would mean nothing."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"
