"""Rows of text as a table, plain or as GitHub's Markdown. The first row is the header."""

from collections.abc import Sequence

from tabulate import DataRow, TableFormat, tabulate

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


def plain(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces, whatever the width of the terminal."""
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A pipe table without padding; bars and line ends inside cells would end them."""
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    return str(tabulate(cells, headers="firstrow", tablefmt=_MARKDOWN, stralign=None, disable_numparse=True))
