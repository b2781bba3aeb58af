"""python -m export inspect PATH, diff A B, verify PATH: what finished artifacts are. None of them runs a model."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import ExportError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
NAMES = ("inspect", "diff", "verify")
"""First arguments that are no model; no YAML of configs/models has one of these names."""
RECORDS = Path("build/records/records.jsonl")
Artifact = Annotated[Path, typer.Argument(exists=True, help="an artifact folder, or a model file of any exporter")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON record")]


@app.command()
def inspect(path: Artifact, json: AsJson = False) -> None:
    """Plan, interface, cache, operations, bytes per module, scheme of every layer, files."""
    from . import inspection

    found = inspection.inspect(path)
    if json:
        print(found.model_dump_json(indent=1))
    else:
        inspection.show(found)


@app.command()
def diff(
    a: Artifact,
    b: Artifact,
    json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="a summary to paste as a comment")] = False,
    records: Annotated[
        list[Path] | None,
        typer.Option(help="validation records with speed and KL, may be repeated; default: " + str(RECORDS)),
    ] = None,
) -> None:
    """Size, schemes, integers and scales, interface, plan, tools, and what validation measured: A against B."""
    from . import difference

    if json and markdown:
        raise typer.BadParameter("the record has everything that the summary says", param_hint="--markdown with --json")
    found = difference.compare(a, b, records or [RECORDS])
    if json:
        print(found.model_dump_json(indent=1))
    elif markdown:
        print(difference.markdown(found))
    else:
        difference.show(found)


@app.command()
def verify(
    path: Artifact,
    limit: Annotated[float, typer.Option(min=1, help="seconds for reading the model")] = 900.0,
) -> None:
    """Exit 0 when the folder is what its manifest says, 1 with a line for everything that is wrong."""
    from . import verification

    if not path.is_dir():
        raise typer.BadParameter("give the artifact folder, which holds manifest.json", param_hint="PATH")
    findings = verification.verify(path, limit)
    for finding in findings:
        print(finding)
    if findings:
        raise ExportError(f"{path}: {len(findings)} found wrong")
    print(f"{path}: as its manifest says")
