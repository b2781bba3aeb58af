"""Validated artifacts as a page of Markdown, for the summary of a CI job. Measures nothing."""

from collections.abc import Iterator, Sequence

from . import summary
from .judged import Judged
from .regression import Change

COLUMNS = (
    *("artifact", "MB", "bits/weight", "KL as shipped", "top-1", "prefill, tok/s", "decode, tok/s", "TTFT, ms"),
    *("verdict", "why"),
)
CHANGES = ("artifact", "", "baseline", "now", "change", "tolerance", "verdict")
KEPT = tuple(summary.COLUMNS.index(name) for name in summary.COLUMNS if name != "RSS MB")


def render(artifacts: Sequence[Judged]) -> str:
    """The verdict, every artifact, and what changed since the baseline."""
    failed = sum(not one.holds for one in artifacts)
    verdict = f"{failed} of {len(artifacts)} artifacts failed" if failed else "every artifact holds"
    lines = [f"## Artifacts: {verdict}", "", *table(COLUMNS, [row(one) for one in artifacts])]
    lines += ["", "### Against the baseline", "", *against(artifacts), *measured_on(artifacts)]
    return "\n".join(lines) + "\n"


def row(one: Judged) -> list[str]:
    """Its numbers, its verdict, and the first gate that decided it."""
    if one.record is None:
        return [one.name, *["–"] * (len(COLUMNS) - 3), "**failed**", one.problem]
    cells = summary.row(one.record)
    verdict = one.record.outcome.value if one.holds else f"**{one.record.outcome.value}**"
    return [*(cells[i] for i in KEPT[:-1]), verdict, one.record.detail]


def against(artifacts: Sequence[Judged]) -> Iterator[str]:
    """A table of what is compared, then a line for each that is not."""
    rows = [[one.name, *change_row(change)] for one in artifacts for change in one.changes]
    if rows:
        yield from table(CHANGES, rows)
    notes = [f"- `{one.name}`: {one.note}" for one in artifacts if one.note]
    yield from ["", *notes] if rows and notes else notes


def change_row(change: Change) -> list[str]:
    """What it was and is, the change with its noise, and the most that it may get worse by."""
    numbers = [f"{change.before:.4g} {change.unit}", f"{change.now:.4g} {change.unit}"]
    shares = ["–", "–"]
    if change.before:
        noise, tolerance = change.noise / change.before, change.tolerance / change.before
        shares = [f"{change.now / change.before - 1:+.1%} ± {noise:.1%}", f"{tolerance:.1%}"]
    return [change.name, *numbers, *shares, change.verdict if change.verdict == "pass" else f"**{change.verdict}**"]


def measured_on(artifacts: Sequence[Judged]) -> Iterator[str]:
    """Which machines and commits the numbers belong to."""
    records = [one.record for one in artifacts if one.record]
    for line in dict.fromkeys(
        f"Measured on {one.device}: {one.environment.cpu}, {one.environment.cores} cores; commit `{one.commit[:12]}`."
        for one in records
    ):
        yield from ("", line)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; bars and line ends inside cells would end them."""
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in (columns, *rows)]
    return ["| " + " | ".join(line) + " |" for line in (cells[0], ["---"] * len(columns), *cells[1:])]
