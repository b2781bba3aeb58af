"""Rows of text as a table, for the terminal and for markdown, and numbers with their spread. Knows no benchmark."""

from collections.abc import Sequence

from .ratios import Ratio, Spread

Row = tuple[str, ...]
NONE = "–"


def with_spread(found: Spread | None, digits: int) -> str:
    """`118.2 (116.0–119.4)`."""
    if found is None:
        return NONE
    return f"{found.median:.{digits}f} ({found.p10:.{digits}f}–{found.p90:.{digits}f})"


def with_quartiles(found: Ratio | None) -> str:
    """`1.52 (1.48–1.55)`."""
    return NONE if found is None else f"{found.median:.2f} ({found.q1:.2f}–{found.q3:.2f})"


def plain(rows: Sequence[Row]) -> str:
    """Columns padded with spaces."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(rows: Sequence[Row]) -> str:
    """A pipe table; the first row is the header."""
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
