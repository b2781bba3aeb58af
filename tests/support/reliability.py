"""Counts the cases of tests marked `reliability` or `kind` and writes docs/reliability.md: `make reliability`.

A test records with `record_property` how many `cases` it went through (default: one), and a `note` on them.
"""

import datetime
import platform
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
HEADS = {"kind": "kind", "reliability": "trouble"}
"""Marker → head of the first column of its table, which stands between two comments that name the marker."""


@dataclass
class Row:
    """Tests of one kind of trouble."""

    outcome: str
    cases: int = 0
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


TABLES: dict[str, dict[str, Row]] = {marker: {} for marker in HEADS}
SKIPPED: dict[str, str] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "teardown":
        return report
    given = item.callspec.params if hasattr(item, "callspec") else {}
    for marker in filter(None, map(item.get_closest_marker, TABLES)):
        trouble, outcome = marker.args
        if report.skipped:
            SKIPPED[item.name] = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
            continue
        if report.when != "call" or not report.passed:
            continue
        row = TABLES[marker.name].setdefault(trouble.format(**given), Row(outcome))
        found = dict(item.user_properties)
        row.cases += int(found.get("cases", 1))
        row.notes += [str(found["note"])] if "note" in found else []
        file = item.path.relative_to(ROOT).as_posix()
        if file not in row.files:
            row.files.append(file)
    return report


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and all(TABLES.values()):
        text = PAGE.read_text(encoding="utf-8")
        for name, rows in TABLES.items():
            start, end = f"<!-- {name}: written by `make reliability` -->", f"<!-- end of {name} -->"
            before, after = text.split(start)[0], text.split(end)[1]
            text = f"{before}{start}\n\n{table(HEADS[name], rows)}\n\n{end}{after}"
        PAGE.write_text(text, encoding="utf-8")


def table(head, rows):
    """The rows in the order in which they ran, and the tests that were skipped."""
    lines = [f"| {head} | cases | outcome in all of them | tests |", "|---|---|---|---|"]
    for trouble, row in rows.items():
        outcome = "; ".join([row.outcome, *row.notes])
        lines.append(f"| {trouble} | {row.cases:,} | {outcome} | {', '.join(f'`{name}`' for name in row.files)} |")
    total = sum(row.cases for row in rows.values())
    date = datetime.datetime.now(datetime.UTC).date()
    lines += ["", f"{total:,} cases, {date}, {platform.system()}, Python {platform.python_version()}."]
    lines += [f"Not run: `{name}` ({why})." for name, why in SKIPPED.items()]
    return "\n".join(lines)
