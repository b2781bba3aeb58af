"""Scores as text: for the terminal, the model card and the page. Knows no sessions."""

from collections.abc import Sequence

from export.card import Measured

from . import published
from .compare import Compared
from .published import Published
from .results import Name, Score, retention

NONE = "–"
HEADER = ("task", "metric", "questions", "fp32", "this file", "retention")
PUBLISHED_HEADER = ("benchmark", "setting", "published", "fp32", "this file", "retention", "measured by")


def rows(one: Compared) -> list[tuple[str, ...]]:
    """Every score of an artifact under `HEADER`."""
    return [(*labels(name), *cells(one, name)) for name in one.scores]


def labels(name: Name) -> tuple[str, str]:
    """Task, and metric with its filter where there is one."""
    task, metric, filter_name = name
    return task, metric if filter_name == "none" else f"{metric} ({filter_name})"


def cells(one: Compared, name: Name) -> tuple[str, str, str, str]:
    """Questions, reference, artifact, retention."""
    score, reference = one.scores[name], one.references.get(name)
    return questions(score), with_error(reference), with_error(score), kept_share(score, reference)


def questions(score: Score) -> str:
    """`300`, or `25 of 300` where not all were asked."""
    return f"{score.questions:,}" if score.questions == score.of else f"{score.questions:,} of {score.of:,}"


def with_error(score: Score | None, scale: float = 1, digits: int = 4) -> str:
    """`0.0433 ± 0.0118`, as lm-evaluation-harness prints it."""
    if score is None:
        return NONE
    error = "" if score.stderr is None else f" ± {score.stderr * scale:.{digits}f}"
    return f"{score.value * scale:.{digits}f}{error}"


def kept_share(score: Score, reference: Score | None) -> str:
    """`98.3%`."""
    share = retention(score, reference) if reference else None
    return NONE if share is None else f"{share:.1%}"


def published_rows(of: Published, model: str, one: Compared | None) -> list[tuple[str, ...]]:
    """Every published score of a model under `PUBLISHED_HEADER`, percent, beside what an artifact of it scored."""
    column = of.models.index(model)
    return [(row.benchmark, row.setting, f"{row.published[column]:g}", *measured_cells(row, one)) for row in of.rows]


def measured_cells(row: published.Row, one: Compared | None) -> tuple[str, str, str, str]:
    """Reference, artifact, retention, and by what; a row that was not measured says how it would be."""
    measured = published.measure(row, one.scores, one.groups) if one else None
    if one is None or measured is None:
        how = f"--tasks {row.ways[0].run}. {row.ways[0].note}" if row.ways else row.note
        return NONE, NONE, NONE, f"not measured: {how}"
    score, way = measured.score, measured.way
    beside = published.measure(row, one.references, one.groups, way)
    reference = beside.score if beside else None
    by = f"{way.run}, questions: {questions(score)}. {way.note}"
    return with_error(reference, 100, 1), with_error(score, 100, 1), kept_share(score, reference), by


def card_rows(one: Compared) -> list[Measured]:
    """The rows of a model card: tasks and groups, not what the groups are made of."""
    found = []
    for name in one.scores:
        if name[0] not in one.inside:
            asked, reference, score, share = cells(one, name)
            note = f"fp32 {reference}, retention {share}, questions: {asked}"
            found.append(Measured(" ".join(labels(name)), score, note))
    how = "chat template applied" if one.newest.chat else "no chat template"
    return [*found, Measured("tasks run by", f"lm-evaluation-harness {one.newest.harness}", how)]


def show(one: Compared) -> None:
    """An artifact's scores in the terminal."""
    print(f"\n{one.model}\n{plain([HEADER, *rows(one)])}")
    if one.newest.truncated:
        print(f"{one.newest.truncated} prompts were longer than the context and lost their beginning")


def plain(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces; the first two to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)
