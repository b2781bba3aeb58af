"""Benchmarks under docs/: one record, page and set of figures per model and recipe, and an index of them all.

    python -m runtime_tests.bench.publish      # every page again from the records, after a change of words

A page is rendered from its own record alone, so writing one model's leaves the others as they are.
"""

from pathlib import Path

from pydantic import ValidationError

from export.errors import ExportError
from export.manifest import ROOT
from export.plan import explain

from . import figures, index, page
from .results import Benchmark

DOCS = ROOT / "docs"
FOLDER = "benchmarks"


def publish(benchmark: Benchmark, docs: Path) -> list[Path]:
    """Keep a run as its model's current one; its page, its figures and the index are written."""
    folder = docs / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{name_of(benchmark)}.json"
    write(record, benchmark.model_dump_json() + "\n")
    return [record, *render(benchmark, folder), render_index(docs)]


def name_of(benchmark: Benchmark) -> str:
    """`MODEL_RECIPE`, as in the names of artifact folders."""
    return f"{benchmark.model}_{benchmark.quant}"


def render(benchmark: Benchmark, folder: Path) -> list[Path]:
    """The page of one run and its figures."""
    name = name_of(benchmark)
    drawn = {f"{name}-{kind}.svg": figure for kind, figure in figures.draw(benchmark).items()}
    paths = [write(folder / file, figure.svg) for file, figure in drawn.items()]
    return [*paths, write(folder / f"{name}.md", page.render(benchmark, {f: one.label for f, one in drawn.items()}))]


def render_index(docs: Path) -> Path:
    """docs/benchmarks.md from every record."""
    runs = {f"{FOLDER}/{path.stem}": read(path) for path in sorted((docs / FOLDER).glob("*.json"))}
    return write(docs / "benchmarks.md", index.render(runs))


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
    print(f"written: {render_index(DOCS).relative_to(ROOT)} and the pages it names")


if __name__ == "__main__":
    main()
