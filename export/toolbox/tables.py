"""Rows of text as a table, plain or as GitHub's Markdown. The first row is the header."""

from collections.abc import Sequence

from tabulate import DataRow, TableFormat, tabulate

from export.host.text import Markdown, visible
from export.host.text import markdown as escaped

NONE = "–"
"""A cell without a value."""
Row = tuple[str, ...]
_BARS = DataRow("| ", " | ", " |")
_MARKDOWN = TableFormat(
    lineabove=None,
    linebelowheader=lambda widths, _alignments: "|" + " --- |" * len(widths),
    linebetweenrows=None,
    linebelow=None,
    headerrow=_BARS,
    datarow=_BARS,
    padding=0,
    with_header_hide=None,
)


def number(value: float, digits: int = 4) -> str:
    """A value for people: whole numbers as they are, `122,907`, and others with four digits."""
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.{digits}g}"


def plain(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns padded with spaces, whatever the width of the terminal."""
    cells = [[visible(cell) for cell in row] for row in rows]
    lines: list[str] = tabulate(cells, tablefmt="plain", disable_numparse=True).split("\n")
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> Markdown:
    """A pipe table without padding; a cell that is not Markdown already is a text."""
    cells = [[escaped(cell) for cell in row] for row in rows]
    return Markdown(tabulate(cells, headers="firstrow", tablefmt=_MARKDOWN, stralign=None, disable_numparse=True))
