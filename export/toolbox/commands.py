"""python -m export inspect PATH, diff A B, verify PATH, sign PATH: finished artifacts. No model is run."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.errors import ExportError
from export.host.console import say

if TYPE_CHECKING:
    from export.architecture import Strict

    from .inspection import Inspection

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_RECORDS = Path("build/records/records.jsonl")
_Artifact = Annotated[Path, typer.Argument(exists=True, help="an artifact folder, or a model file of any exporter")]
_Folder = Annotated[Path, typer.Argument(exists=True, help="the artifact folder, which holds manifest.json")]
_AsJson = Annotated[bool, typer.Option("--json", help="one JSON record")]
_Svg = Annotated[Path | None, typer.Option(dir_okay=False, help="draw bytes and schemes into this file too")]


@app.command()
def inspect(path: _Artifact, json: _AsJson = False, svg: _Svg = None) -> None:
    """Plan, interface, cache, operations, bytes per module, scheme of every layer, files."""
    from . import inspection

    inspected = inspection.inspect(path)
    draw(svg, inspected)
    if json:
        _say_json(inspected)
    else:
        inspection.show(inspected)


@app.command()
def diff(
    a: _Artifact,
    b: _Artifact,
    json: _AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="a summary to paste as a comment")] = False,
    records: Annotated[
        list[Path] | None,
        typer.Option(help="validation records with speed and KL, may be repeated; default: " + str(_RECORDS)),
    ] = None,
    svg: _Svg = None,
) -> None:
    """Size, schemes, integers and scales, interface, plan, tools, and results of validation: A against B."""
    from . import difference

    if json and markdown:
        raise typer.BadParameter("the record has everything that the summary has", param_hint="--markdown with --json")
    compared = difference.compare(a, b, records or [_RECORDS])
    if svg:
        from . import inspection

        draw(svg, *map(inspection.inspect, (a, b)))
    if json:
        _say_json(compared)
    elif markdown:
        say(*difference.markdown(compared).split("\n"))
    else:
        difference.show(compared)


def _say_json(record: "Strict") -> None:
    """ASCII, in which JSON escapes what `say` would, and names of files whose bytes are not UTF-8."""
    say(*dumps(record.model_dump(mode="json"), indent=1).split("\n"))


def draw(file: Path | None, *inspections: "Inspection") -> None:
    """Write the picture into `file`, if any."""
    if file is None:
        return
    from . import inspection

    try:
        file.write_text(inspection.draw(inspections), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{file}: cannot be written ({error.strerror})") from None


@app.command()
def verify(
    path: _Folder,
    limit: Annotated[float, typer.Option(min=1, help="seconds for reading the model")] = 900.0,
    key: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="public key (PEM) of its signer")
    ] = None,
) -> None:
    """Exit 0 when the folder is what its manifest says, 1 with a line for everything that is wrong."""
    from . import verification

    _require_folder(path)
    findings = verification.verify(path, limit, key)
    say(*findings)
    if findings:
        raise ExportError(f"{path}: {len(findings)} found wrong")
    say(f"{path}: as its manifest says{verification.about_signature(path, key)}")


@app.command()
def sign(
    path: _Folder,
    key: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="private key (PEM): P-256, P-384 or P-521")],
) -> None:
    """Write the provenance of a folder that holds what its manifest says, then model.sig over everything in it."""
    from export.formats import admission

    from . import provenance, signature

    _require_folder(path)
    described = admission.admit(path)
    say(
        f"{provenance.sign(path, described, key)}: signed with {key}", f"{signature.sign(path, key)}: signed with {key}"
    )


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise typer.BadParameter("give the artifact folder, which holds manifest.json", param_hint="PATH")
