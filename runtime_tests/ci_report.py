"""python -m runtime_tests.ci_report FOLDER… [--out DIR] [--device NAME]: validated artifacts for a CI system.

Writes `summary.md`, `junit.xml` and the records they were made from; in GitHub Actions the job's summary too. Runs
nothing: the newest record of each artifact's build counts. Exit 0 only if every artifact has one and holds.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from export.cli import run

from . import baseline, ci_summary, judged, junit, step_summary

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    folders: Annotated[list[Path], typer.Argument(help="artifact folders")],
    out: Annotated[Path, typer.Option(help="where the report goes")] = Path("build/ci"),
    device: Annotated[str, typer.Option(help="a name in devices/: where they were validated")] = "host",
) -> None:
    """Write what validation found of these artifacts, and exit 1 unless all of them hold."""
    artifacts = [judged.judge(folder, baseline.RECORDS, device) for folder in folders]
    page = ci_summary.render(artifacts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.md").write_text(page, encoding="utf-8")
    lines = [one.record.model_dump_json() + "\n" for one in artifacts if one.record]
    (out / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    junit.write(artifacts, out / "junit.xml")
    step_summary.append(page)
    print(page)
    print(f"report: {out}/summary.md, junit.xml, records.jsonl")
    if not all(one.holds for one in artifacts):
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(run(app))
