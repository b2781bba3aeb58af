"""A run in the terminal: a table of all artifacts, a table of their losses, then notes and failed gates.

Plain text where stdout is no terminal.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from export.host.console import Plain, say
from export.toolbox.tables import NONE, number, plain
from runtime_tests.checks.loss import nats, worst
from runtime_tests.evidence.record import Accuracy, Outcome, Record

_COLOURS = {Outcome.PASS: "green", Outcome.INCONCLUSIVE: "yellow"}
COLUMNS = ("artifact", "MB", "bits/w", "KL", "top-1", "prefill/s", "decode/s", "TTFT ms", "RSS MB", "verdict")
_LOSSES = ("mean KL, nats", "as shipped", "quantization", "lowering", "worst text", "", "worst positions", "")


def row(record: Record) -> list[str]:
    """One line of the summary, as text; `–` where nothing was measured. KL and top-1 are the file's as shipped."""
    total, speed = record.accuracy.total, record.timings
    return [
        record.artifact,
        f"{record.size_bytes / 1e6:.1f}",
        f"{record.bits_per_weight:.2f}",
        nats(total.mean_kl) if total else NONE,
        f"{total.top1:.1%}" if total else NONE,
        f"{max(test.avg_ts for test in speed.tests if test.n_prompt):.0f}" if speed else NONE,
        f"{speed.tests[-1].avg_ts:.1f}" if speed else NONE,
        f"{speed.ttft_p50_s * 1e3:.0f}" if speed else NONE,
        f"{speed.peak_rss_bytes / 1e6:.0f}" if speed else NONE,
        record.outcome.value,
    ]


def _loss_row(artifact: str, accuracy: Accuracy) -> list[str]:
    """An artifact's loss, in all and by step, and its worst text and positions; empty where none was measured."""
    total, steps = accuracy.total, (accuracy.quantization, accuracy.lowering)
    if total is None:
        return []
    text, of_text = worst(total.by_domain)
    positions, of_positions = worst(total.by_position)
    by_step = (nats(step.mean_kl) if step else NONE for step in steps)
    return [artifact, nats(total.mean_kl), *by_step, text, nats(of_text.mean_kl), positions, nats(of_positions.mean_kl)]


def show(records: Sequence[Record], page: Path) -> None:
    """Print the run: both tables, what the verdicts do not say, each failed gate, the path of the report."""
    console = Plain()
    if console.is_terminal:
        console.print(table(records))
    else:
        say(*plain([COLUMNS, *map(row, records)]))
    losses = [cells for record in records if (cells := _loss_row(record.artifact, record.accuracy))]
    if losses:
        say("", *plain([_LOSSES, *losses]))
    for record in records:
        for note in record.notes:
            console.print(f"{record.artifact}: note: {note}", style="yellow", soft_wrap=True)
        for line in problems(record):
            console.print(line, style="red" if not record.holds else "yellow", soft_wrap=True)
    console.print(f"report: {page}", soft_wrap=True)


def table(records: Sequence[Record]) -> Table:
    """The summary for a terminal."""
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        drawn.add_column(name, justify="left" if name in ("artifact", "verdict") else "right", no_wrap=True)
    for record in records:
        cells: list[str | Text] = list(row(record))
        cells[-1] = Text(record.outcome.value, style=_COLOURS.get(record.outcome, "bold red"))
        drawn.add_row(*cells)
    return drawn


def problems(record: Record) -> list[str]:
    """Every gate that does not hold, or the reason an artifact's run ended."""
    lines = []
    for gate in record.gates:
        if gate.verdict != "pass":
            measured = f"{number(gate.value)} ({gate.rule} {number(gate.limit)})"
            lines.append(f"{record.artifact}: {gate.verdict}: {gate.name} {measured} {gate.detail}".rstrip())
    if not record.holds and not any(gate.verdict == "fail" for gate in record.gates):
        lines.append(f"{record.artifact}: {record.outcome.value}: {record.detail}")
    return lines
