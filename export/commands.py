"""python -m export inspect PATH, diff A B, verify PATH, sign PATH: finished artifacts. None of them runs a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import ExportError

if TYPE_CHECKING:
    from .inspection import Inspection

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
NAMES = ("inspect", "diff", "verify", "sign")
"""First arguments that are no model; no YAML of configs/models has one of these names."""
RECORDS = Path("build/records/records.jsonl")
Artifact = Annotated[Path, typer.Argument(exists=True, help="an artifact folder, or a model file of any exporter")]
Folder = Annotated[Path, typer.Argument(exists=True, help="the artifact folder, which holds manifest.json")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON record")]
Svg = Annotated[Path | None, typer.Option(dir_okay=False, help="draw bytes and schemes into this file too")]


@app.command()
def inspect(path: Artifact, json: AsJson = False, svg: Svg = None) -> None:
    """Plan, interface, cache, operations, bytes per module, scheme of every layer, files."""
    from . import inspection

    found = inspection.inspect(path)
    draw(svg, found)
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
    svg: Svg = None,
) -> None:
    """Size, schemes, integers and scales, interface, plan, tools, and what validation measured: A against B."""
    from . import difference

    if json and markdown:
        raise typer.BadParameter("the record has everything that the summary says", param_hint="--markdown with --json")
    found = difference.compare(a, b, records or [RECORDS])
    if svg:
        from . import inspection

        draw(svg, *map(inspection.inspect, (a, b)))
    if json:
        print(found.model_dump_json(indent=1))
    elif markdown:
        print(difference.markdown(found))
    else:
        difference.show(found)


def draw(file: Path | None, *found: "Inspection") -> None:
    """The picture, where one is asked for."""
    if file is None:
        return
    from . import picture

    try:
        file.write_text(picture.draw(found), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{file}: cannot be written ({error.strerror})") from None


@app.command()
def verify(
    path: Folder,
    limit: Annotated[float, typer.Option(min=1, help="seconds for reading the model")] = 900.0,
    key: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="public key (PEM) of who should have signed it")
    ] = None,
) -> None:
    """Exit 0 when the folder is what its manifest says, 1 with a line for everything that is wrong."""
    from . import verification

    require_folder(path)
    findings = verification.verify(path, limit, key)
    for finding in findings:
        print(finding)
    if findings:
        raise ExportError(f"{path}: {len(findings)} found wrong")
    print(f"{path}: as its manifest says{verification.about_signature(path, key)}")


@app.command()
def sign(
    path: Folder,
    key: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="private key (PEM): P-256, P-384 or P-521")],
) -> None:
    """Write model.sig over everything in a folder whose files are those of its manifest."""
    from . import signing, verification

    require_folder(path)
    verification.require_whole(path)
    print(f"{signing.sign(path, key)}: signed with {key}")


def require_folder(path: Path) -> None:
    """Not a bare model file."""
    if not path.is_dir():
        raise typer.BadParameter("give the artifact folder, which holds manifest.json", param_hint="PATH")
