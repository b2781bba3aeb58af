"""The page of task scores: one table for each artifact, and Meta's published scores beside those of Llama 3.2."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import published, tables
from .compare import Compared


def render(compared: Sequence[Compared]) -> str:
    """The page; loads nothing from anywhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(sections=[section(one) for one in compared])


def section(one: Compared) -> dict[str, object]:
    """What the page shows of an artifact."""
    base = str(one.newest.facts["base"])
    known = published.find(base)
    return {
        "model": one.model,
        "how": [
            f"lm-evaluation-harness {one.newest.harness}",
            "chat template applied" if one.newest.chat else "no chat template",
            f"commit {one.newest.facts['commit']}",
            f"{one.newest.truncated} prompts cut on the left" if one.newest.truncated else "no prompt cut",
        ],
        "header": tables.HEADER,
        "rows": tables.rows(one),
        "published_header": tables.PUBLISHED_HEADER,
        "published": tables.published_rows(known, base, one) if known else [],
        "source": known.source if known else "",
        "file": one.newest.path,
    }


def write(compared: Sequence[Compared], build: Path) -> Path:
    """Write `build/report/tasks.html`."""
    path = build / "report" / "tasks.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(compared), encoding="utf-8")
    return path
