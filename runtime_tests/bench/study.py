"""Size against loss: `python -m runtime_tests.bench.study MODEL RECIPE … [--source …] [--eval …] [--write NAME]`.

Every recipe of ours in all three formats, and llama.cpp's own mixtures of the same weights, each judged on the file
that ships through its runtime. Nothing is timed.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import devices
from export import manifest
from export.cli import run as run_app
from export.manifest import ROOT
from export.plan import load_plan
from export.progress import console, stage

from ..jobs import Opening
from ..record import Outcome
from . import contenders, domain_table, fidelity, study_page
from .results import Fidelity
from .roles import LLAMA_CPP_KINDS, ONNX, OUR_FORMS, RUNTIMES, Form
from .stock import BENCH, NotMadeError, make
from .study_page import Judged
from .table_text import plain

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Ready:
    """A file to judge."""

    label: str
    runtime: str
    size_bytes: int
    ours: bool
    opening: Opening


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
    threads = devices.thread_count(devices.load("host"))
    further = [recipe.strip() for recipe in also.split(",") if recipe.strip()]
    pairs = [(recipe, target) for recipe in recipes for target in OUR_FORMS] + [(recipe, ONNX) for recipe in further]
    folders = {pair: contenders.built(load_plan(model, *pair), source) for pair in pairs}
    first = next(iter(folders.values()))
    ready = [ours(recipe, OUR_FORMS[target], folder, threads) for (recipe, target), folder in folders.items()]
    ready += llama_cpps(first, source, threads)
    found = study_page.study(model, eval_name, manifest.read(ROOT / first), judged(ready, first, source, eval_name))
    print("\n" + plain(domain_table.rows(found.rows)))
    if write:
        for path in study_page.write(found, write, command(model, recipes, also, write)):
            print(f"written: {path.relative_to(ROOT)}")
    if any(row.fidelity.outcome is not Outcome.PASS for row in found.rows):
        raise typer.Exit(1)


def command(model: str, recipes: list[str], also: str, write: str) -> str:
    """As it is typed; where the weights were is this machine's own."""
    further = f" --also {also}" if also else ""
    return f"python -m runtime_tests.bench.study {model} {' '.join(recipes)}{further} --source DIR --write {write}"


def ours(recipe: str, form: Form, folder: Path, threads: int) -> Ready:
    """One artifact folder of ours."""
    described = manifest.read(ROOT / folder)
    opening = Opening(
        runner=form.runner,
        path=str(ROOT / folder / RUNTIMES[form.runner].file),
        tokenizer=str(ROOT / folder / "tokenizer.json"),
        context=described.contract.kv.context_length,
        threads=threads,
    )
    return Ready(f"{form.label}, {recipe}", RUNTIMES[form.runner].label, described.artifact_bytes, True, opening)


def llama_cpps(folder: Path, source: str | None, threads: int) -> Iterator[Ready]:
    """llama.cpp's mixtures of the same weights; where they cannot be had, it is said."""
    described = manifest.read(ROOT / folder)
    for kind in LLAMA_CPP_KINDS:
        try:
            made = make(f"llamacpp-{kind}", described, folder / manifest.FILE, source)
        except NotMadeError as error:
            console.print(f"left out: llama.cpp {kind}: {error}", style="yellow", soft_wrap=True)
            continue
        opening = Opening(
            runner="llamacpp",
            path=str(ROOT / made.folder / RUNTIMES["llamacpp"].file),
            tokenizer=str(ROOT / folder / "tokenizer.json"),
            context=described.contract.kv.context_length,
            threads=threads,
        )
        size = contenders.model_bytes(Path(made.folder))
        yield Ready(f"llama.cpp {kind.upper()}", RUNTIMES["llamacpp"].label, size, False, opening)


def judged(ready: list[Ready], folder: Path, source: str | None, eval_name: str) -> Iterator[Judged]:
    """Every file against the fp32 model of the checkpoint, on the same windows."""
    described, cut = manifest.read(ROOT / folder), fidelity.windows(ROOT / folder, eval_name)
    with tempfile.TemporaryDirectory(prefix=".logits-", dir=ROOT / BENCH) as scratch:
        room = Path(scratch)
        np.save(room / "tokens.npy", cut.tokens)
        with stage("reference", "fp32 logits"):
            fidelity.compute_reference(ROOT / folder, source, cut, room, threads=ready[0].opening.threads)
        for one in ready:
            with stage("accuracy", f"{one.label}, {one.runtime}"):
                found: Fidelity = fidelity.judge_one(one.label, one.opening, described, cut, room)
            yield Judged(label=one.label, runtime=one.runtime, size_bytes=one.size_bytes, ours=one.ours, fidelity=found)


if __name__ == "__main__":
    sys.exit(run_app(app))
