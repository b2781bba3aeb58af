"""Counts the cases of tests marked with a name of `HEADS` and writes docs/reliability.md: `make reliability`.

A test records with `record_property` how many `cases` it went through (default: one), and a `note` on them.
"""

import datetime
import platform
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
HEADS = {"kind": ("kind",), "reliability": ("trouble",), "hostile": ("who is hostile", "inputs tried")}
"""Marker → heads of the first columns of its table, which stands between two comments that name the marker.

The marker has a text for each of these, then the outcome.
"""


# ── kinds of what people's own files and machines do ──────────────────────────────────────────────────────────────────

IDENTITY = pytest.mark.kind(
    "what belongs to a checkpoint: weights, settings, tokenizer, templates, adapter, code, commit",
    "a change is seen and named; what cannot be known is `unknown`",
)
DISAGREEMENT = pytest.mark.kind(
    "where two places say one thing", "joined as transformers does and said, or refused by name"
)
RUNTIME_TOKENIZER = pytest.mark.kind(
    "the tokenizer that runtimes will use", "the ids of tokenizer.json, one BOS, every end; else a note on the card"
)
SMALL_DIFFERENCE = pytest.mark.kind(
    "small differences: short contexts, numbers of float32, one token more",
    "accepted and said, or refused with the remedy",
)
LOCATION = pytest.mark.kind(
    "where it lies: links, blobs, any characters in a path, no locks, nothing writable", "works, or one line"
)
MOVED_ARTIFACT = pytest.mark.kind(
    "artifacts that went through hubs, git and file managers", "whole; links refused alike by every command"
)
CONVERSATION = pytest.mark.kind(
    "a conversation goes on: broken text, refused messages, closed streams", "one line, and the rest is answered"
)
FOREIGN_WORDS = pytest.mark.kind(
    "what devices, shells and loaders of others print and lack",
    "not taken for an answer; told in their words with a remedy",
)
NOT_DAMAGED = pytest.mark.kind(
    "what is not damaged: pointers, other forms, types and settings", "named as what it is, with a remedy that works"
)
NUMBERS = pytest.mark.kind("numbers out of range, ids out of the vocabulary, batches", "red, or refused")
TELEMETRY = pytest.mark.kind("onnxruntime's telemetry", "nothing is written at home")


# ── the tables ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """Tests of one kind of trouble."""

    outcome: str
    cases: int = 0
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


TABLES: dict[str, dict[tuple[str, ...], Row]] = {marker: {} for marker in HEADS}
SKIPPED: dict[str, str] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "teardown":
        return report
    given = item.callspec.params if hasattr(item, "callspec") else {}
    for marker in filter(None, map(item.get_closest_marker, TABLES)):
        *what, outcome = marker.args
        if report.skipped:
            SKIPPED[item.name] = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
            continue
        if report.when != "call" or not report.passed:
            continue
        row = TABLES[marker.name].setdefault(tuple(text.format(**given) for text in what), Row(outcome))
        found = dict(item.user_properties)
        row.cases += int(found.get("cases", 1))
        row.notes += [str(found["note"])] if "note" in found and marker.name == "reliability" else []
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


def table(heads, rows):
    """The rows in the order in which they ran, or by who is hostile, and the tests that were skipped."""
    lines = ["| " + " | ".join([*heads, "cases", "outcome in all of them", "tests"]) + " |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for what, row in sorted(rows.items(), key=lambda item: item[0][:-1]):
        outcome = "; ".join([row.outcome, *row.notes])
        files = ", ".join(f"`{name}`" for name in row.files)
        lines.append("| " + " | ".join([*what, f"{row.cases:,}", outcome, files]) + " |")
    total = sum(row.cases for row in rows.values())
    date = datetime.datetime.now(datetime.UTC).date()
    lines += ["", f"{total:,} cases, {date}, {platform.system()}, Python {platform.python_version()}."]
    lines += [f"Not run: `{name}` ({why})." for name, why in SKIPPED.items()]
    return "\n".join(lines)
