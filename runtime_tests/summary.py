"""A run in the terminal: one table, then what failed. Plain text when stdout is no terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .record import Outcome, Record

COLOURS = {Outcome.PASS: "green", Outcome.INCONCLUSIVE: "yellow"}
COLUMNS = ("artifact", "MB", "bits/w", "KL", "top-1", "prefill/s", "decode/s", "TTFT ms", "RSS MB", "verdict")


def row(record: Record) -> list[str]:
    """One line of the summary, as text; `–` where nothing was measured."""
    lowering, speed = record.accuracy.lowering, record.timings
    return [
        record.artifact,
        f"{record.size_bytes / 1e6:.1f}",
        f"{record.bits_per_weight:.2f}",
        f"{lowering.mean_kl:.1e}" if lowering else "–",
        f"{lowering.top1:.1%}" if lowering else "–",
        f"{max(test.avg_ts for test in speed.tests if test.n_prompt):.0f}" if speed else "–",
        f"{speed.tests[-1].avg_ts:.1f}" if speed else "–",
        f"{speed.ttft_p50_s * 1e3:.0f}" if speed else "–",
        f"{speed.peak_rss_bytes / 1e6:.0f}" if speed else "–",
        record.outcome.value,
    ]


def show(records: Sequence[Record], page: Path) -> None:
    """Print the run: the table, each failed gate, where the report is."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table(records))
    else:
        print_plain(records)
    for record in records:
        for line in problems(record):
            console.print(Text(line, style="red" if not record.holds else "yellow"), soft_wrap=True)
    console.print(f"report: {page}", soft_wrap=True)


def table(records: Sequence[Record]) -> Table:
    """The summary for a terminal."""
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        drawn.add_column(name, justify="left" if name in ("artifact", "verdict") else "right", no_wrap=True)
    for record in records:
        cells: list[str | Text] = list(row(record))
        cells[-1] = Text(record.outcome.value, style=COLOURS.get(record.outcome, "bold red"))
        drawn.add_row(*cells)
    return drawn


def print_plain(records: Sequence[Record]) -> None:
    """Columns padded with spaces, whatever the width."""
    rows = [list(COLUMNS), *(row(record) for record in records)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(COLUMNS))]
    for line in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def problems(record: Record) -> list[str]:
    """Every gate that does not hold, or the reason an artifact's run ended."""
    lines = []
    for gate in record.gates:
        if gate.verdict != "pass":
            limit = f"{gate.rule} {gate.limit:.4g}"
            lines.append(
                f"{record.artifact}: {gate.verdict}: {gate.name} {gate.value:.4g} ({limit}) {gate.detail}".rstrip()
            )
    if not record.holds and not any(gate.verdict == "fail" for gate in record.gates):
        lines.append(f"{record.artifact}: {record.outcome.value}: {record.detail}")
    return lines
