"""Scores as text: for the terminal, the model card and the page of all artifacts."""

from collections.abc import Sequence
from pathlib import Path

from export.card import Measured
from export.host.console import say
from export.toolbox.tables import NONE, plain
from runtime_tests.reports import templates

from . import results
from .results import Compared, Name, Published, PublishedScore, Score, retention

_TEMPLATE = Path(__file__).parent / "page.html.j2"
HEADER = ("task", "metric", "questions", "fp32", "this file", "retention")
_PUBLISHED_HEADER = ("benchmark", "setting", "published", "fp32", "this file", "retention", "measured by")


def rows(artifact: Compared) -> list[tuple[str, ...]]:
    """Every score of an artifact under `HEADER`."""
    return [(*_labels(name), *cells(artifact, name)) for name in artifact.scores]


def _labels(name: Name) -> tuple[str, str]:
    task, metric, filter_name = name
    return task, metric if filter_name == "none" else f"{metric} ({filter_name})"


def cells(artifact: Compared, name: Name) -> tuple[str, str, str, str]:
    """Questions, reference, artifact, retention."""
    score, reference = artifact.scores[name], artifact.references.get(name)
    return _questions(score), _with_error(reference), _with_error(score), _kept_share(score, reference)


def _questions(score: Score) -> str:
    """`300`, or `25 of 300` where a limit was given."""
    return f"{score.questions:,}" if score.questions == score.of else f"{score.questions:,} of {score.of:,}"


def _with_error(score: Score | None, scale: float = 1, digits: int = 4) -> str:
    """`0.0433 ± 0.0118`, as lm-evaluation-harness prints it."""
    if score is None:
        return NONE
    error = "" if score.stderr is None else f" ± {score.stderr * scale:.{digits}f}"
    return f"{score.value * scale:.{digits}f}{error}"


def _kept_share(score: Score, reference: Score | None) -> str:
    share = retention(score, reference) if reference else None
    return NONE if share is None else f"{share:.1%}"


def published_rows(published: Published, model: str, artifact: Compared | None) -> list[tuple[str, ...]]:
    """Every published score of a model under `_PUBLISHED_HEADER`, percent, beside the scores of an artifact of it."""
    column = published.models.index(model)
    return [
        (row.benchmark, row.setting, f"{row.published[column]:g}", *_measured_cells(row, artifact))
        for row in published.rows
    ]


def _measured_cells(row: PublishedScore, artifact: Compared | None) -> tuple[str, str, str, str]:
    """Reference, artifact, retention and tasks; a row that was not measured names the tasks that would measure it."""
    if artifact:
        for way in row.ways:
            if score := way.score(artifact.scores, artifact.groups):
                reference = way.score(artifact.references, artifact.groups)
                by = f"{way.run}, questions: {_questions(score)}. {way.note}"
                return _with_error(reference, 100, 1), _with_error(score, 100, 1), _kept_share(score, reference), by
    how = f"--tasks {row.ways[0].run}. {row.ways[0].note}" if row.ways else row.note
    return NONE, NONE, NONE, f"not measured: {how}"


def card_rows(artifact: Compared) -> list[Measured]:
    """The rows of a model card: tasks and groups, not the members of the groups."""
    scored = []
    for name in artifact.scores:
        if name[0] not in artifact.inside:
            questions, reference, score, share = cells(artifact, name)
            note = f"fp32 {reference}, retention {share}, questions: {questions}"
            scored.append(Measured(" ".join(_labels(name)), score, note))
    template = "chat template applied" if artifact.newest.chat else "no chat template"
    return [*scored, Measured("tasks run by", f"lm-evaluation-harness {artifact.newest.harness}", template)]


def show(artifact: Compared) -> None:
    """An artifact's scores in the terminal."""
    say("", artifact.model, *plain([HEADER, *rows(artifact)]))
    if artifact.newest.truncated:
        say(f"{artifact.newest.truncated} prompts were longer than the context and lost their beginning")


def _section(artifact: Compared) -> dict[str, object]:
    base = str(artifact.newest.facts["base"])
    known = results.published(base)
    return {
        "artifact": artifact,
        "rows": [HEADER, *rows(artifact)],
        "published": [_PUBLISHED_HEADER, *published_rows(known, base, artifact)] if known else [],
        "source": known.source if known else "",
    }


def write(compared: Sequence[Compared], build: Path) -> Path:
    """Write `build/report/tasks.html`: a table for each artifact, and Meta's scores beside those of Llama 3.2."""
    path = build / "report" / "tasks.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    page = templates.render(_TEMPLATE, sections=[_section(artifact) for artifact in compared])
    path.write_text(page, encoding="utf-8")
    return path
