"""docs/choosing.md, which recipe for which device, from what was measured: `make choosing`.

The page is written from the records of the study and the benchmarks (docs/accuracy.json, docs/benchmarks/*.json), from
shapes, and from answers that artifacts gave: docs/choosing.json, which `--ask` measures again.
"""

import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Annotated

import typer

from export import manifest
from export.architecture import Architecture
from export.build.command import run as run_app
from export.errors import ExportError
from export.host.console import say
from export.manifest import ROOT
from export.plan import ModelSpec, QuantRecipe, load_named
from export.quantization import schemes
from export.toolbox.tables import Row
from runtime_tests.reports import templates

from .. import publish, tables
from ..results import Benchmark, StudyRun, Timing
from .study import Study

RECIPES = ("int4-mixed", "int4-g32-gptq", "int4-g64-gptq", "int4-g128-gptq", "int4-g32-scales", "int4-g32", "int4-g128")
"""Of which sizes are told, without those for trials and for checkpoints that are quantized already."""
MODELS = ("llama32-1b-instruct", "llama32-3b-instruct")
_QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Tom has 3 apples and buys 2 more. How many apples does he have now?",
    "Write one sentence about the sea.",
)
_LONGEST_ANSWER = 48
_ONNX = "our .onnx, "

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Answers(StudyRun):
    """What artifacts of one checkpoint answered, greedily."""

    questions: tuple[str, ...]
    answers: dict[str, tuple[str, ...]]
    """Recipe → an answer to each question."""


@app.command()
def main(
    ask: Annotated[list[Path] | None, typer.Option(help="artifact folders that are asked again")] = None,
) -> None:
    """Write the page; with --ask FOLDER… the answers on it too."""
    record = publish.DOCS / "choosing.json"
    answers = asked(ask) if ask else Answers.model_validate_json(record.read_bytes())
    if ask:
        publish.write(record, answers.model_dump_json(indent=1) + "\n")
    study = Study.model_validate_json((publish.DOCS / "accuracy.json").read_bytes())
    runs = [publish.read(path) for path in sorted((publish.DOCS / publish.FOLDER).glob("llama32-*.json"))]
    say(f"written: {publish.write(publish.DOCS / 'choosing.md', page(study, runs, answers)).relative_to(ROOT)}")


def page(study: Study, runs: list[Benchmark], answers: Answers) -> str:
    """The page as Markdown."""
    return templates.render(
        publish.TEMPLATES / "choosing.md.j2",
        study=study,
        losses=losses(study),
        sizes=sizes(),
        runs=[(run, devices(run)) for run in runs],
        answers=answers,
        answered=answered(answers),
    )


def losses(study: Study) -> list[Row]:
    """A row for each recipe as ONNX, the least loss first: file size, KL, top-1, and what it does to perplexity."""
    rows: list[Row] = [("recipe", "MB", "KL", "top-1", "perplexity", "more than fp32")]
    ours = [row for row in study.rows if row.label.startswith(_ONNX) and row.fidelity.perplexity is not None]
    for row in sorted(ours, key=lambda row: tables.overall(row.fidelity)):
        loss = row.fidelity
        assert loss.perplexity is not None
        assert loss.reference_perplexity is not None
        rows.append(
            (
                row.label.removeprefix(_ONNX),
                f"{row.size_bytes / 1e6:.1f}",
                f"{tables.overall(loss):.3f}",
                f"{loss.top1:.1%}",
                f"{loss.perplexity:.2f}",
                f"{loss.perplexity / loss.reference_perplexity - 1:+.0%}",
            )
        )
    return rows


def sizes() -> list[Row]:
    """A row for each recipe: megabytes of weights of the full-size models, from their shapes."""
    rows: list[Row] = [("recipe", *MODELS)]
    architectures = [a for model in MODELS if (a := load_named(ModelSpec, "models", model).architecture)]
    for name in RECIPES:
        recipe = load_named(QuantRecipe, "quant", name)
        cells = [_megabytes(recipe, architecture) for architecture in architectures]
        rows.append((name, *cells))
    return rows


def _megabytes(recipe: QuantRecipe, architecture: Architecture) -> str:
    stored = schemes.of_recipe(recipe, architecture)
    bits = stored.stored_bits(float_bits=32)
    if recipe.promotion:  # which linears get more bits is not known without weights, what they take together is
        linears = {name: prod(shape) for name, shape in architecture.linear_shapes().items()}
        unpromoted = sum(
            count * schemes.bits_each(stored.by_name[name], architecture.linear_shapes()[name][-1])
            for name, count in linears.items()
        )
        bits += sum(linears.values()) * recipe.promotion.linear_bits_per_weight - unpromoted
    return f"{bits / 8e6:.0f}"


def answered(answers: Answers) -> list[tuple[str, list[Row]]]:
    """Each question with a row for each recipe's answer."""
    return [
        (
            question,
            [
                ("recipe", "answer"),
                *((recipe, " ".join(given[at].split())) for recipe, given in answers.answers.items()),
            ],
        )
        for at, question in enumerate(answers.questions)
    ]


def devices(run: Benchmark) -> list[Row]:
    """A row for each of our artifacts in its runtime: size, memory while it runs, and speed."""
    longest = max(run.settings.prompts)
    head = ("artifact", "runtime", "file, MB", f"memory at {longest} tokens, MB", "memory at a full context, MB")
    rows: list[Row] = [(*head, f"prefill of {longest}, tokens/s", "decode, tokens/s")]
    for entry in run.entries:
        near, far, prefill, decode = (
            run.spread(entry.name, metric)
            for metric in (
                lambda timing: timing.peak_rss_bytes / 1e6,
                lambda timing: timing.far_peak_rss_bytes / 1e6,
                tables.prefill(longest),
                Timing.decode_tps,
            )
        )
        if entry.ours and near and far and prefill and decode:
            label = entry.label if "," in entry.label else f"{entry.label}, {run.quant}"
            shown = [f"{near.median:.0f}", f"{far.median:.0f}", f"{prefill.median:.0f}", f"{decode.median:.1f}"]
            rows.append((label, entry.runtime, f"{entry.size_bytes / 1e6:.0f}", *shown))
    return rows


def asked(folders: list[Path]) -> Answers:
    """Each artifact's greedy answers, through its own chat template, a new conversation for each."""
    manifests = [manifest.read(folder) for folder in folders]
    answers = {
        described.plan.quant.name: tuple(_answer(folder, question) for question in _QUESTIONS)
        for folder, described in zip(folders, manifests, strict=True)
    }
    conditions = publish.conditions(manifests[0].plan.name, "chat")
    return Answers(questions=_QUESTIONS, answers=answers, **conditions)


def _answer(folder: Path, question: str) -> str:
    words = [sys.executable, "-m", "runtime_tests", "chat", str(folder), "--max-new-tokens", str(_LONGEST_ANSWER)]
    ended = subprocess.run(words, input=f"{question}\n", capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ExportError(f"{folder}: no answer: {ended.stderr.strip()[-300:]}")
    return ended.stdout.strip()


if __name__ == "__main__":
    sys.exit(run_app(app))
