"""python -m runtime_tests.reports.ci FOLDER… [--out DIR] [--device NAME]: validated artifacts for a CI system.

Writes `summary.md`, `junit.xml` and the records behind them; in GitHub Actions the job's summary too. Runs no artifact:
the newest record of each artifact's build counts. Exit code 0 only if every artifact has a record and holds.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from export.build.command import run
from export.host.console import say
from export.host.text import Markdown, code, visible
from export.host.text import markdown as escaped
from export.toolbox import tables
from runtime_tests.evidence import baseline
from runtime_tests.evidence.baseline import Judged
from runtime_tests.evidence.record import Gate
from runtime_tests.evidence.regression import Change

from . import summary

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_COLUMNS = (
    *("artifact", "MB", "bits/weight", "KL as shipped", "top-1", "prefill, tok/s", "decode, tok/s", "TTFT, ms"),
    *("verdict", "why"),
)
NOT_BUILT = "not built: its build failed, see the log; what its folder holds, if anything, is of an earlier one"
_CHANGES = ("artifact", "", "baseline", "now", "change", "limit", "verdict")
_SHOWN = tuple(summary.COLUMNS.index(name) for name in summary.COLUMNS if name != "RSS MB")


@app.command()
def main(
    folders: Annotated[list[Path], typer.Argument(help="artifact folders")],
    out: Annotated[Path, typer.Option(help="where the report goes")] = Path("build/ci"),
    device: Annotated[str, typer.Option(help="a name in devices/: where they were validated")] = "host",
    not_built: Annotated[
        list[Path] | None, typer.Option(help="one of them whose build failed: what its folder holds is of before")
    ] = None,
) -> None:
    """Report the validation of these artifacts; exit code 1 unless all of them hold."""
    failed = not_built or []
    artifacts = [
        Judged(folder.name, None, NOT_BUILT, (), "")
        if folder in failed
        else baseline.judge(folder, baseline.RECORDS, device)
        for folder in [*folders, *(folder for folder in failed if folder not in folders)]
    ]
    page = render(artifacts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.md").write_text(page, encoding="utf-8")
    lines = [artifact.record.model_dump_json() + "\n" for artifact in artifacts if artifact.record]
    (out / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    write(artifacts, out / "junit.xml")
    append(page)
    say(*page.split("\n"))
    say(f"report: {out}/summary.md, junit.xml, records.jsonl")
    if not all(artifact.holds for artifact in artifacts):
        raise typer.Exit(1)


def render(artifacts: Sequence[Judged]) -> str:
    """The verdict, every artifact, notes on its verdict, and what changed since the baseline."""
    failed = sum(not artifact.holds for artifact in artifacts)
    verdict = f"{failed} of {len(artifacts)} artifacts failed" if failed else "every artifact holds"
    lines = [f"## Artifacts: {verdict}", "", tables.markdown([_COLUMNS, *map(row, artifacts)])]
    noted = [(artifact, note) for artifact in artifacts if artifact.record for note in artifact.record.notes]
    lines += ["", *(f"- {code(artifact.name)}: {escaped(note)}" for artifact, note in noted)] if noted else []
    lines += ["", "### Against the baseline", "", *against(artifacts), *_measured_on(artifacts)]
    return "\n".join(lines) + "\n"


def row(artifact: Judged) -> list[str]:
    """The artifact's numbers, its verdict, and the first gate that decided it."""
    if artifact.record is None:
        return [artifact.name, *[tables.NONE] * (len(_COLUMNS) - 3), Markdown("**failed**"), artifact.problem]
    cells = summary.row(artifact.record)
    verdict = artifact.record.outcome.value if artifact.holds else Markdown(f"**{artifact.record.outcome.value}**")
    return [*(cells[i] for i in _SHOWN[:-1]), verdict, artifact.record.detail]


def against(artifacts: Sequence[Judged]) -> Iterator[str]:
    """A table of all comparisons, then a line for each artifact without one."""
    rows = [[artifact.name, *change_row(change)] for artifact in artifacts for change in artifact.changes]
    if rows:
        yield tables.markdown([_CHANGES, *rows])
    notes = [f"- {code(artifact.name)}: {escaped(artifact.note)}" for artifact in artifacts if artifact.note]
    yield from ["", *notes] if rows and notes else notes


def change_row(change: Change) -> list[str]:
    """Value before and now, the change with its noise, and the most it may be."""
    numbers = [f"{tables.number(change.before)} {change.unit}", f"{tables.number(change.now)} {change.unit}"]
    shares = [tables.NONE, tables.NONE]
    if change.before:
        noise, limit = change.noise / change.before, change.limit / change.before
        shares = [f"{change.now / change.before - 1:+.1%} ± {noise:.1%}", f"{limit:.1%}"]
    verdict = change.verdict if change.verdict == "pass" else Markdown(f"**{change.verdict}**")
    return [change.name, *numbers, *shares, verdict if change.gated else "another run: no gate"]


def _measured_on(artifacts: Sequence[Judged]) -> Iterator[str]:
    records = [artifact.record for artifact in artifacts if artifact.record]
    lines = [
        f"Measured on {escaped(r.device)}: {escaped(r.environment)}; commit {code(r.commit[:12])}." for r in records
    ]
    for line in dict.fromkeys(lines):
        yield from ("", line)


def append(text: str) -> None:
    """Add Markdown to the summary of the running job, if there is one."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)


def write(artifacts: Sequence[Judged], path: Path) -> None:
    """One JUnit file for all artifacts; what XML does not have, a runtime's last words hold, is visible in it."""
    xml = JUnitXml("artifacts")
    for artifact in artifacts:
        xml.append(_suite(artifact))
    xml.update_statistics()
    xml.write(str(path), pretty=True)


def _suite(artifact: Judged) -> TestSuite:
    """One artifact: a case for each gate, and one for the end of its run where no gate failed."""
    suite = TestSuite(visible(artifact.name))
    if artifact.record is None:
        suite.add_testcase(_case(artifact.name, "validated", Error(visible(artifact.problem))))
        return suite
    record = artifact.record
    facts = {"device": record.device, "cpu": record.environment.cpu, "commit": record.commit, "run_id": record.run_id}
    for name, value in facts.items():
        suite.add_property(name, visible(value))
    for note in record.notes:
        suite.add_property("note", visible(note))
    for gate in record.gates:
        suite.add_testcase(_case(artifact.name, gate.name, _verdict(gate)))
    if not artifact.holds and all(gate.verdict != "fail" for gate in record.gates):
        suite.add_testcase(_case(artifact.name, "run", Error(visible(record.detail), record.outcome.value)))
    return suite


def _case(artifact: str, name: str, result: Error | Failure | Skipped | None) -> TestCase:
    """Without a result the case passes."""
    case = TestCase(visible(name), classname=visible(artifact))
    if result is not None:
        case.result = [result]
    return case


def _verdict(gate: Gate) -> Failure | Skipped | None:
    """Value and limit of a gate that fails; one that noise left open counts as skipped."""
    if gate.verdict == "pass":
        return None
    limit = f"{tables.number(gate.value, 6)}, must be {gate.rule} {tables.number(gate.limit, 6)}"
    message = visible(f"{limit}: {gate.detail}" if gate.detail else limit)
    return Failure(message, gate.fails_as.value) if gate.verdict == "fail" else Skipped(message, gate.verdict)


if __name__ == "__main__":
    sys.exit(run(app))
