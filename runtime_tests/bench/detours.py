"""What quantizing a quantized checkpoint costs: `python -m runtime_tests.bench.detours MODEL --source … [--write]`.

Each form of the same weights is quantized again by our recipe, and where a recipe keeps its integers, by that one too.
Logits of the ONNX file as shipped are compared with two fp32 models: of the weights that the checkpoint's file stands
for, and of the weights that it was made from. Nothing is timed.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import devices
from export import checkpoint, manifest
from export.cli import run as run_app
from export.errors import ExportError
from export.manifest import ROOT, Manifest, source_info, tool_versions
from export.places import locate
from export.plan import ModelSpec, Strict, load_named, load_plan
from export.progress import console, stage

from .. import environment, evaluation
from ..accuracy import compare
from ..evaluation import Windows
from ..jobs import Opening
from ..record import Comparison, Environment, Outcome
from . import contenders, fidelity, publish
from .conditions import conditions
from .detour_forms import FORMS, home, weight_bytes
from .roles import ONNX, OUR_FORMS, RUNTIMES
from .stock import BENCH
from .table_text import NONE, Row, markdown, plain

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
WORDS = """\
# What a detour costs

The best source is the published bf16 checkpoint. What people have is often 4 bits already. Quantizing that again adds a
second loss to the first, unless the integers can be kept. Mean KL divergence in nats, {positions} positions of the
evaluation `{evaluation}`, of the ONNX file as shipped in onnxruntime; {model} with its 4-bit grid dithered away, so
that the float weights are what a quantizer meets in practice.

- **first**: from the float weights to the weights that the checkpoint's file stands for (fp32 model of both);
- **second**: from those to our artifact, onnxruntime's own rounding of activations included;
- **in all**: from the float weights to our artifact.

"""


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


class Detours(Strict):
    """One run."""

    model: str
    evaluation: str
    positions: int
    rows: tuple[Detour, ...]
    environment: Environment
    commit: str
    tools: dict[str, str]


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    source: Annotated[str, typer.Option(help="float weights")],
    recipe: Annotated[str, typer.Option(help="quantizes every form")] = "int4-g32",
    eval_name: Annotated[str, typer.Option("--eval", help="a name in configs/evals")] = "default",
    write: Annotated[bool, typer.Option("--write", help="write docs/detours.md and its record")] = False,
) -> None:
    """Judge every form; forms made once are kept in build/detours."""
    with tempfile.TemporaryDirectory(prefix=".detours-", dir=ROOT / BENCH) as scratch:
        rows = tuple(judged(model, source, recipe, eval_name, Path(scratch)))
    cut = evaluation.load(eval_name)
    found = Detours(
        model=model,
        evaluation=eval_name,
        positions=sum(text.windows for text in cut.texts) * (cut.decode + 1),
        rows=rows,
        environment=environment.current(),
        commit=source_info().commit,
        tools=tool_versions(),
    )
    print("\n" + plain(table(found)))
    if write:
        command = f"python -m runtime_tests.bench.detours {model} --source DIR --write"
        for path in (
            publish.write(publish.DOCS / "detours.json", found.model_dump_json() + "\n"),
            publish.write(publish.DOCS / "detours.md", render(found, command)),
        ):
            print(f"written: {path.relative_to(ROOT)}")


def judged(model: str, source: str, recipe: str, eval_name: str, room: Path) -> Iterator[Detour]:
    """Every form and recipe."""
    direct = contenders.built(load_plan(model, recipe, ONNX), source)
    cut = fidelity.windows(ROOT / direct, eval_name)
    float_logits = reference(direct, source, cut, room / "float")
    for key, (label, _, keeps) in FORMS.items():
        place = made(key, model, source)
        first, exact = None, room / key
        for name in (recipe, keeps) if keeps else (recipe,):
            folder = contenders.built(load_plan(model, name, ONNX), str(place))
            if first is None:
                first = compare(
                    load(float_logits), load(reference(folder, str(place), cut, exact)), cut.targets, cut.labels
                )
            second, whole = artifact(folder, cut, exact, float_logits)
            yield Detour(
                form=label,
                source_bytes=weight_bytes(place),
                recipe=name,
                artifact_bytes=manifest.read(ROOT / folder).artifact_bytes,
                first_kl=first.mean_kl,
                second_kl=second.mean_kl,
                kl=whole.mean_kl,
                top1=whole.top1,
            )
        shutil.rmtree(exact)


def made(key: str, model: str, source: str) -> Path:
    """A form of the checkpoint, written once; another source needs another folder or none."""
    label, write, _ = FORMS[key]
    folder = home(model) / key
    done = folder / "done"
    if done.is_file():
        return Path(done.read_text(encoding="utf-8"))
    vocabulary = locate(load_named(ModelSpec, "models", model).source or "")
    if not isinstance(vocabulary, Path) or vocabulary.suffix != ".gguf":
        raise ExportError(f"model {model!r} has no GGUF of its own, whose tokenizer the GGUF forms need")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with stage("checkpoint", label):
        place = write(checkpoint.load(load_named(ModelSpec, "models", model), source), folder, vocabulary)
    done.write_text(str(place), encoding="utf-8")
    return place


def reference(folder: Path, source: str, cut: Windows, room: Path) -> Path:
    """fp32 logits of a checkpoint."""
    room.mkdir()
    np.save(room / "tokens.npy", cut.tokens)
    with stage("reference", source):
        fidelity.compute_reference(ROOT / folder, source, cut, room, threads=threads())
    return room / "reference.npy"


def artifact(folder: Path, cut: Windows, room: Path, float_logits: Path) -> tuple[Comparison, Comparison]:
    """An ONNX file against its own checkpoint, and against the float weights."""
    described: Manifest = manifest.read(ROOT / folder)
    form = OUR_FORMS[ONNX]
    opening = Opening(
        runner=form.runner,
        path=str(ROOT / folder / RUNTIMES[form.runner].file),
        tokenizer=str(ROOT / folder / "tokenizer.json"),
        context=described.contract.kv.context_length,
        threads=threads(),
    )
    with stage("accuracy", described.id):
        ended = fidelity.judge_one(described.id, opening, described, cut, room)
    if ended.outcome is not Outcome.PASS:
        raise ExportError(f"{folder}: {ended.outcome.value}: {ended.detail}")
    found = load(room / "candidate.npy")
    own, first = (
        compare(load(path), found, cut.targets, cut.labels) for path in (room / "reference.npy", float_logits)
    )
    return own, first


def load(path: Path) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Logits, memory-mapped."""
    logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = np.load(path, mmap_mode="r")
    return logits


def threads() -> int:
    """Of this machine."""
    return devices.thread_count(devices.load("host"))


def table(found: Detours) -> list[Row]:
    """Header and a row for each artifact."""
    header: Row = ("checkpoint", "MB", "recipe", "artifact MB", "first", "second", "in all", "top-1")
    rows: list[Row] = [header]
    for one in found.rows:
        again = rows[-1][0] == one.form or (rows[-1][0] == NONE)
        losses = (f"{kl:.4f}" for kl in (one.first_kl, one.second_kl, one.kl))
        sizes = (f"{one.source_bytes / 1e6:.1f}", f"{one.artifact_bytes / 1e6:.1f}")
        name = NONE if again and one.recipe.endswith("exact") else one.form
        rows.append((name, sizes[0], one.recipe, sizes[1], *losses, f"{one.top1:.1%}"))
    return rows


def render(found: Detours, command: str) -> str:
    """The page."""
    head = WORDS.format(positions=found.positions, evaluation=found.evaluation, model=found.model)
    foot = conditions(command, found.environment, found.commit, found.tools)
    return f"{head}{markdown(table(found))}{foot}"


if __name__ == "__main__":
    console.print("detours: every form is built and judged once", style="dim")
    sys.exit(run_app(app))
