"""docs/benchmarks: the page and figures of each run, and the index: `python -m runtime_tests.bench.publish`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import typer
from pydantic import ValidationError

from export.build.command import run as run_app
from export.errors import ExportError, explain
from export.formats import tool_versions
from export.host.console import say
from export.manifest import ROOT, source_info
from export.toolbox.charts import MUTED, OURS, STOCK, STRONG, Point, document, rect, rule, scatter, text
from runtime_tests.places import environment
from runtime_tests.reports import templates

from . import tables
from .results import Benchmark, Metric, StudyRun, Timing

_WIDTH, _LABELS, _RIGHT = 780, 300, 640
"""Of a figure, in pixels; where names end, and where the longest bar ends."""
_ROW = 40
_HEAD = 34


class _Figure(NamedTuple):
    """An SVG file and its caption."""

    svg: str
    label: str


def draw(run: Benchmark) -> dict[str, _Figure]:
    """Kind → figure; what was not measured is not drawn."""
    longest, near = max(run.settings.prompts), run.settings.near_position
    figures = {
        "decode": _bars(run, Timing.decode_tps, f"decoded tokens per second around position {near}"),
        "prefill": _bars(run, tables.prefill(longest), f"prefill of {longest} tokens, tokens per second"),
    }
    if run.settings.far_prompt:
        label = f"decoded tokens per second around position {run.settings.far_position}"
        figures["decode-far"] = _bars(run, Timing.far_decode_tps, label)
    entries = {entry.name: entry for entry in run.entries}
    compared = [(entries[f.contender], f.mean_kl) for f in run.fidelity if f.positions and f.mean_kl > 0]
    points = [
        Point(entry.size_bytes / 1e6, kl, f"{entry.label} · {entry.runtime}", entry.ours) for entry, kl in compared
    ]
    if points:
        label = "mean KL to the fp32 model over size"
        figures["accuracy"] = _Figure(scatter(points, label, "MB", "mean KL, nats"), label)
    return figures


def _bars(run: Benchmark, metric: Metric, label: str) -> _Figure:
    """A bar per contender that ran: the median, with a line from p10 to p90."""
    shown = [(entry, spread) for entry in run.entries if (spread := run.spread(entry.name, metric))]
    scale = (_RIGHT - _LABELS) / max([1e-9, *(spread.high for _, spread in shown)])
    parts = [text(16, 22, label, STRONG)]
    for i, (entry, spread) in enumerate(shown):
        y, width = _HEAD + i * _ROW, max(spread.median * scale, 1)
        parts += [
            text(_LABELS - 12, y + 17, entry.label, STRONG if entry.ours else "", "end"),
            text(_LABELS - 12, y + 32, entry.runtime, MUTED, "end"),
            rect(_LABELS, y + 10, width, 20, css=OURS if entry.ours else STOCK),
            rule(_LABELS + spread.low * scale, _LABELS + spread.high * scale, y + 20),
            text(_RIGHT + 10, y + 25, spread.text(0)),
        ]
    return _Figure(document(_WIDTH, _HEAD + len(shown) * _ROW + 8, label, parts), label)


DOCS = ROOT / "docs"
TEMPLATES = Path(__file__).parent / "templates"
FOLDER = "benchmarks"


def publish(benchmark: Benchmark, docs: Path) -> list[Path]:
    """Store a run as its model's current one; its page, its figures and the index are written."""
    folder = docs / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    record = write(folder / f"{_name(benchmark)}.json", benchmark.model_dump_json() + "\n")
    return [record, *render(benchmark, folder), _render_index(docs)]


def conditions(model: str, evaluation: str) -> dict[str, Any]:
    """The fields of every study."""
    return {
        "model": model,
        "evaluation": evaluation,
        "environment": environment.current(),
        "commit": source_info().commit,
        "tools": tool_versions(),
    }


def publish_study(name: str, study: StudyRun, page: str, figure: str = "") -> None:
    """docs/NAME.json, docs/NAME.md and docs/NAME.svg where there is a figure."""
    parts = {"json": study.model_dump_json() + "\n", "svg": figure, "md": page}
    for suffix in filter(parts.get, parts):
        say(f"written: {write(DOCS / f'{name}.{suffix}', parts[suffix]).relative_to(ROOT)}")


def render(benchmark: Benchmark, folder: Path) -> list[Path]:
    """The page of one run and its figures."""
    name = _name(benchmark)
    drawn = {f"{name}-{kind}.svg": figure for kind, figure in draw(benchmark).items()}
    paths = [write(folder / file, figure.svg) for file, figure in drawn.items()]
    labels = {file: figure.label for file, figure in drawn.items()}
    return [*paths, write(folder / f"{name}.md", page(benchmark, labels))]


def page(run: Benchmark, figures: Mapping[str, str]) -> str:
    """The page of one run as markdown; `figures` are files beside it and what they show."""
    return templates.render(
        TEMPLATES / "benchmark.md.j2",
        run=run,
        figures=figures,
        tables={table.__name__: table(run) for table in tables.SHOWN},
        commands={entry.made_by: entry.tools for entry in run.entries if entry.made_by},
    )


def _render_index(docs: Path) -> Path:
    """docs/benchmarks.md from every record: a section per model, with its ratios and a link to its page."""
    runs = {f"{FOLDER}/{path.stem}": read(path) for path in sorted((docs / FOLDER).glob("*.json"))}
    return write(
        docs / "benchmarks.md", templates.render(TEMPLATES / "index.md.j2", runs=runs, compared=tables.compared)
    )


def read(path: Path) -> Benchmark:
    """A record, strictly."""
    try:
        return Benchmark.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ExportError(f"{path}: of another version: {explain(error)[:200]}; measure again with --write") from None


def write(path: Path, text: str) -> Path:
    """A file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    return part.replace(path)


def main() -> None:
    """Every page, figure and the index again."""
    for path in sorted((DOCS / FOLDER).glob("*.json")):
        render(read(path), path.parent)
    say(f"written: {_render_index(DOCS).relative_to(ROOT)} and the pages it names")


def _name(benchmark: Benchmark) -> str:
    return f"{benchmark.model}_{benchmark.quant}"  # as in the names of artifact folders


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    sys.exit(run_app(app))
