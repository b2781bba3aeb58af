"""What lm-evaluation-harness wrote about a model, read back. Knows no sessions and no tables."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import ExportError

Name = tuple[str, str, str]
"""Task or group, metric, filter; `none` where answers are not filtered."""


@dataclass(frozen=True)
class Score:
    """One metric of one task or group, as lm-eval gives it: shares of 1, perplexities."""

    value: float
    stderr: float | None
    """null where lm-eval has none: perplexities, single questions."""
    higher_is_better: bool
    questions: int
    of: int
    """Questions the task has."""


@dataclass(frozen=True)
class Results:
    """One results file."""

    path: Path
    model: str
    """As the file names it: an artifact's id."""
    facts: Mapping[str, Any]
    """What was said about the model when it was evaluated."""
    date: float
    chat: bool
    """Whether the tokenizer's chat template was applied."""
    harness: str
    """Version of lm-evaluation-harness."""
    scores: Mapping[Name, Score]
    members: Mapping[str, tuple[str, ...]]
    """Group → its tasks and groups."""
    truncated: int
    """Prompts that lost their beginning because they did not fit the context."""


def read(path: Path) -> Results:
    """Read one results file; raises ExportError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        config = found["config"]
        facts = dict(config["model_args"])
        return Results(
            path=path,
            model=str(facts.pop("pretrained")),
            facts=facts,
            date=float(found["date"]),
            chat=bool(found["chat_template"]),
            harness=str(found["lm_eval_version"]),
            scores=dict(scores(found)),
            members=subtasks(found),
            truncated=sum(config.get("truncated_requests", {}).values()),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ExportError(f"{path}: not a results file of `--tasks` ({what}); remove it") from None


def scores(found: Mapping[str, Any]) -> Iterator[tuple[Name, Score]]:
    """Every number of a results file that is a score."""
    for task, numbers in found["results"].items():
        leaves = list(single_tasks(task, subtasks(found)))
        counts = [found["n-samples"][leaf] for leaf in leaves]
        for key, value in numbers.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = numbers.get(f"{metric}_stderr,{filter_name}")
            better = found["higher_is_better"].get(leaves[0], {}).get(metric)
            yield (
                (task, metric, filter_name),
                Score(
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    higher_is_better=better is not False,
                    questions=sum(count["effective"] for count in counts),
                    of=sum(count["original"] for count in counts),
                ),
            )


def subtasks(found: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Group → members; single tasks have none."""
    return {name: tuple(inside) for name, inside in found.get("group_subtasks", {}).items() if inside}


def single_tasks(name: str, members: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """The tasks that ask questions: the one of that name, or all in its group."""
    inside = members.get(name, ())
    if not inside:
        yield name
    for member in inside:
        yield from single_tasks(member, members)


def kept(build: Path) -> list[Results]:
    """Every results file of build/tasks, oldest first."""
    return sorted((read(path) for path in build.glob("tasks/*/results_*.json")), key=lambda one: one.date)


def retention(score: Score, reference: Score) -> float | None:
    """Share of the reference's score that is left; where less is better, the inverse ratio. null: nothing of zero."""
    kept_part, whole = (score, reference) if score.higher_is_better else (reference, score)
    return kept_part.value / whole.value if whole.value else None
