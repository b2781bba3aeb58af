"""Counts the cases of tests marked `reliability` and writes them into docs/reliability.md: `make reliability`.

A test records with `record_property` how many `cases` it went through (default: one), and a `note` on them.
"""

import datetime
import platform
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- cases: written by `make reliability` -->", "<!-- end of cases -->"


@dataclass
class Row:
    """Tests of one kind of trouble."""

    outcome: str
    cases: int = 0
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


ROWS: dict[str, Row] = {}
SKIPPED: dict[str, str] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("reliability")
    if marker is None or report.when == "teardown":
        return report
    trouble, outcome = marker.args
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if report.skipped:
        SKIPPED[item.name] = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    elif report.when == "call" and report.passed:
        row = ROWS.setdefault(trouble.format(**given), Row(outcome))
        found = dict(item.user_properties)
        row.cases += int(found.get("cases", 1))
        row.notes += [str(found["note"])] if "note" in found else []
        file = item.path.relative_to(ROOT).as_posix()
        if file not in row.files:
            row.files.append(file)
    return report


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and ROWS:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(START)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{START}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


def table():
    """The rows in the order in which they ran, and the tests that were skipped."""
    lines = ["| trouble | cases | outcome in all of them | tests |", "|---|---|---|---|"]
    for trouble, row in ROWS.items():
        outcome = "; ".join([row.outcome, *row.notes])
        lines.append(f"| {trouble} | {row.cases:,} | {outcome} | {', '.join(f'`{name}`' for name in row.files)} |")
    total = sum(row.cases for row in ROWS.values())
    date = datetime.datetime.now(datetime.UTC).date()
    lines += ["", f"{total:,} cases, {date}, {platform.system()}, Python {platform.python_version()}."]
    lines += [f"Not run: `{name}` ({why})." for name, why in SKIPPED.items()]
    return "\n".join(lines)
