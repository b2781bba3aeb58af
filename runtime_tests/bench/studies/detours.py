"""What a second quantization costs: `python -m runtime_tests.bench.studies.detours MODEL --source … [--write]`.

Each form of the same weights is quantized again by our recipe, and by the recipe that keeps its integers, if there is
one. Logits of the ONNX file as shipped are compared with two fp32 models: of the weights that the checkpoint's file
stands for, and of the weights that it was made from. Nothing is timed.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import Annotated

import typer

import devices
from export import checkpoints, manifest
from export.architecture import Strict
from export.build.command import run as run_app
from export.checkpoints.origin import File, Package, origin_of, parse_origin
from export.errors import ExportError
from export.host.console import console, say, stage
from export.manifest import ROOT
from export.plan import ModelSpec, load_named, load_plan
from export.toolbox.tables import NONE, Row, plain
from runtime_tests import evaluation
from runtime_tests.checks.accuracy import compare
from runtime_tests.evaluation import Windows
from runtime_tests.evidence.record import Outcome
from runtime_tests.places import environment
from runtime_tests.reports import templates

from .. import contenders, exports, fidelity, publish
from ..contenders import ONE_TARGET, SESSION
from ..exports import BENCH
from ..forms import DETOUR_FORMS, home, weight_bytes
from ..results import Fidelity, StudyRun

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_RECIPE, _EVALUATION = "int4-g32", "default"
"""What quantizes every form, and the text that it is judged on."""


class Detour(Strict):
    """One form of the checkpoint under one recipe. KL in nats."""

    form: str
    source_bytes: int
    recipe: str
    artifact_bytes: int
    first_kl: float
    second_kl: float
    kl: float
    top1: float


class Detours(StudyRun):
    """Of one checkpoint."""

    positions: int
    rows: tuple[Detour, ...]


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    source: Annotated[str, typer.Option(help="float weights")],
    write: Annotated[bool, typer.Option("--write", help="write docs/detours.md and its record")] = False,
) -> None:
    """Judge every form; forms are made once and cached in build/detours."""
    with tempfile.TemporaryDirectory(prefix=".detours-", dir=ROOT / BENCH) as scratch:
        rows = tuple(_judge(model, source, Path(scratch)))
    cut = evaluation.load(_EVALUATION)
    positions = sum(text.windows for text in cut.texts) * (cut.decode + 1)
    detours = Detours(positions=positions, rows=rows, **publish.conditions(model, _EVALUATION))
    say("", *plain(table(detours)))
    if write:
        command = f"python -m runtime_tests.bench.studies.detours {model} --source DIR --write"
        publish.publish_study("detours", detours, render(detours, command))


def _judge(model: str, source: str, room: Path) -> Iterator[Detour]:
    threads = environment.threads(devices.load("host"))
    direct = _built(model, _RECIPE, source)
    cut = fidelity.windows(ROOT / direct, _EVALUATION)
    floats = fidelity.compute_reference(ROOT / direct, source, cut, room / "float", threads)
    for key, (label, _, keeps) in DETOUR_FORMS.items():
        place, logits = cached_form(key, model, source), room / key
        folder = _built(model, _RECIPE, str(place))
        exact = fidelity.compute_reference(ROOT / folder, str(place), cut, logits, threads)
        first = compare(floats, exact, cut.targets, cut.labels)
        for recipe in filter(None, (_RECIPE, keeps)):
            folder = _built(model, recipe, str(place))
            second = _judge_artifact(folder, cut, logits, threads)
            whole = compare(floats, fidelity.load(logits / fidelity.CANDIDATE), cut.targets, cut.labels)
            yield Detour(
                form=label,
                source_bytes=weight_bytes(place),
                recipe=recipe,
                artifact_bytes=manifest.read(ROOT / folder).artifact_bytes,
                first_kl=first.mean_kl,
                second_kl=second.mean_kl,
                kl=whole.mean_kl,
                top1=whole.top1,
            )
        shutil.rmtree(logits)


def _built(model: str, recipe: str, source: str) -> Path:
    return exports.built(load_plan(model, recipe, ONE_TARGET), source)


def cached_form(key: str, model: str, source: str) -> Path:
    """A form of the checkpoint, written once: for another source the model's folder must be removed first."""
    label, write, _ = DETOUR_FORMS[key]
    folder = home(model) / key
    done = folder / "done"
    if done.is_file():
        return Path(done.read_text(encoding="utf-8"))
    spec = load_named(ModelSpec, "models", model)
    vocabulary = origin_of(spec, None)
    if not isinstance(vocabulary, File | Package):
        raise ExportError(f"model {model!r} has no GGUF of its own, whose tokenizer the GGUF forms need")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with stage("checkpoint", label):
        place = write(checkpoints.load(spec, parse_origin(source)), folder, vocabulary.path)
    done.write_text(str(place), encoding="utf-8")
    return place


def _judge_artifact(folder: Path, cut: Windows, room: Path, threads: int) -> Fidelity:
    """An ONNX file against its own checkpoint; its logits stay in the room."""
    described = manifest.read(ROOT / folder)
    opening = contenders.opening(SESSION, folder, folder, threads)
    judged = fidelity.judge_one(described.id, opening, described, cut, room)
    if judged.outcome is not Outcome.PASS:
        raise ExportError(f"{folder}: {judged.outcome.value}: {judged.detail}")
    return judged


def table(detours: Detours) -> list[Row]:
    """Header and a row for each artifact; a form is named once."""
    rows: list[Row] = [("checkpoint", "MB", "recipe", "artifact MB", "first", "second", "in all", "top-1")]
    for form, of_form in groupby(detours.rows, key=lambda row: row.form):
        for name, row in zip(chain([form], repeat(NONE)), of_form, strict=False):
            losses = (f"{kl:.4f}" for kl in (row.first_kl, row.second_kl, row.kl))
            sizes = (f"{row.source_bytes / 1e6:.1f}", f"{row.artifact_bytes / 1e6:.1f}")
            rows.append((name, sizes[0], row.recipe, sizes[1], *losses, f"{row.top1:.1%}"))
    return rows


def render(detours: Detours, command: str) -> str:
    """The page."""
    template = publish.TEMPLATES / "detours.md.j2"
    return templates.render(template, run=detours, table=table(detours), command=command)


if __name__ == "__main__":
    console.print("detours: every form is built and judged once", style="dim")
    sys.exit(run_app(app))
