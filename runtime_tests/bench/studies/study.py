"""Size against loss: `python -m runtime_tests.bench.studies.study MODEL RECIPE … [--source …] [--write NAME]`.

Every recipe of ours in every format, and llama.cpp's own mixtures of the same weights, each judged on the file that
ships through its runtime. Nothing is timed.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

import devices
from export import manifest
from export.build.command import run as run_app
from export.host.console import console, say
from export.manifest import ROOT
from export.plan import load_named, load_plan, names
from export.toolbox.charts import Point, scatter
from export.toolbox.tables import Row, plain
from runtime_tests.evaluation import Evaluation
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import Opening
from runtime_tests.places import environment
from runtime_tests.reports import templates
from runtime_tests.sessions import session_module

from .. import contenders, exports, fidelity, forms, publish, tables
from ..contenders import ONE_TARGET, RUNTIMES, SESSION
from ..results import Fidelity, File, StudyRun

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_LLAMA_CPP_KINDS = ("q4_0", "q4_k_m", "q8_0")


class Judged(File):
    """A file and how far it is from the checkpoint."""

    fidelity: Fidelity


class Study(StudyRun):
    """Of many files of one checkpoint."""

    checkpoint: str
    rows: tuple[Judged, ...]


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    recipes: Annotated[list[str], typer.Argument(help="names in configs/quant")],
    source: Annotated[str | None, typer.Option(help="where the weights come from")] = None,
    eval_name: Annotated[str, typer.Option("--eval", help="a name in configs/evals")] = "domains",
    also: Annotated[str, typer.Option(help="further recipes, as ONNX only")] = "",
    write: Annotated[str, typer.Option(help="write docs/NAME.md, its record and its figure")] = "",
) -> None:
    """Judge every artifact on each kind of text; exit 1 if one does not run."""
    threads = environment.threads(devices.load("host"))
    further = [recipe.strip() for recipe in also.split(",") if recipe.strip()]
    pairs = [(recipe, target) for recipe in recipes for target in names("targets")]
    pairs += [(recipe, ONE_TARGET) for recipe in further]
    folders = {pair: exports.built(load_plan(model, *pair), source) for pair in pairs}
    first = next(iter(folders.values()))
    files = [_ours(recipe, folder, threads) for (recipe, _), folder in folders.items()]
    files += _llama_cpps(first, source, threads)
    openings = {file.label: opening for file, opening in files}
    judged = fidelity.judge(openings, ROOT / first, source, fidelity.windows(ROOT / first, eval_name))
    study = Study(
        checkpoint=manifest.read(ROOT / first).checkpoint.description,
        rows=tuple(Judged(**dict(file), fidelity=loss) for (file, _), loss in zip(files, judged, strict=True)),
        **publish.conditions(model, eval_name),
    )
    say("", *plain(_table(study)))
    if write:
        options = f" --also {also}" if also else ""  # DIR: the real path belongs to this machine
        words = f"{model} {' '.join(recipes)}{options} --source DIR --write {write}"
        command = f"python -m runtime_tests.bench.studies.study {words}"
        publish.publish_study(write, study, page(study, write, command), figure(study))
    if any(row.fidelity.outcome is not Outcome.PASS for row in study.rows):
        raise typer.Exit(1)


def _table(study: Study) -> list[Row]:
    return tables.rated((row, row.fidelity) for row in study.rows)


def page(study: Study, name: str, command: str) -> str:
    """docs/NAME.md."""
    evaluation = load_named(Evaluation, "evals", study.evaluation)
    return templates.render(
        publish.TEMPLATES / "study.md.j2",
        run=study,
        evaluation=evaluation,
        table=_table(study),
        figure=f"{name}.svg",
        command=command,
    )


def figure(study: Study) -> str:
    """Every file's mean KL over its size."""
    points = [
        Point(row.size_bytes / 1e6, tables.overall(row.fidelity), row.label, row.ours)
        for row in study.rows
        if row.fidelity.outcome is Outcome.PASS
    ]
    return scatter(points, "mean KL over size", "MB", "mean KL of all kinds, nats")


def _ours(recipe: str, folder: Path, threads: int) -> tuple[File, Opening]:
    described = manifest.read(ROOT / folder)
    file = File(
        label=f"our {Path(described.plan.target.artifact).suffix}, {recipe}",
        runtime=session_module(described).RUNTIME,
        size_bytes=described.artifact_bytes,
        ours=True,
    )
    return file, contenders.opening(SESSION, folder, folder, threads)


def _llama_cpps(folder: Path, source: str | None, threads: int) -> Iterator[tuple[File, Opening]]:
    """llama.cpp's mixtures of the same weights; those that cannot be made are left out with a warning."""
    for kind in _LLAMA_CPP_KINDS:
        try:
            made = Path(exports.make(f"llamacpp-{kind}", folder, source).folder)
        except exports.NotMadeError as error:
            console.print(f"left out: llama.cpp {kind}: {error}", style="yellow", soft_wrap=True)
            continue
        size_bytes = contenders.model_bytes(made)
        file = File(
            label=f"llama.cpp {kind.upper()}", runtime=RUNTIMES["llamacpp"].label, size_bytes=size_bytes, ours=False
        )
        yield file, contenders.opening("llamacpp", made / forms.GGUF, folder, threads)


if __name__ == "__main__":
    sys.exit(run_app(app))
