"""Scores that a model's makers publish, and the tasks of lm-evaluation-harness nearest to them: configs/published."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt
from typing import Annotated

from pydantic import Field, model_validator

from export.architecture import Positive, Strict
from export.plan import load_named, names

from .results import Name, Score


class Way(Strict):
    """Tasks whose mean stands for a published score."""

    run: str
    """The argument of `--tasks`."""
    tasks: tuple[str, ...]
    """Patterns of the single tasks' names."""
    count: Positive
    """Of these tasks."""
    metrics: tuple[Annotated[str, Field(pattern=r"^[^,]+,[^,]+$")], ...]
    """`metric,filter`."""
    note: str
    """How it differs from the published measurement."""


class Row(Strict):
    """One published benchmark."""

    benchmark: str
    setting: str
    published: tuple[float, ...]
    """Percent, one for each model."""
    ways: tuple[Way, ...]
    """The first that was run counts."""
    note: str = ""
    """Why there is no way."""

    @model_validator(mode="after")
    def _a_way_or_a_reason(self) -> "Row":
        if bool(self.ways) == bool(self.note):
            raise ValueError(f"{self.benchmark}: give either ways or a note why there are none")
        return self


class Published(Strict):
    """One YAML of configs/published."""

    name: str
    source: str
    models: tuple[str, ...]
    """Names in configs/models."""
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _a_score_for_each_model(self) -> "Published":
        for row in self.rows:
            if len(row.published) != len(self.models):
                raise ValueError(f"{row.benchmark}: {len(row.published)} scores for {len(self.models)} models")
        return self


@dataclass(frozen=True)
class _Measured:
    """The score of tasks that stand for a published score."""

    score: Score
    """Share of 1."""
    way: Way


def find(model: str) -> Published | None:
    """The published scores of a model of configs/models."""
    loaded = (load_named(Published, "published", name) for name in names("published"))
    return next((published for published in loaded if model in published.models), None)


def measure(row: Row, scores: Mapping[Name, Score], groups: Iterable[str], way: Way | None = None) -> _Measured | None:
    """A row's score by its first way that was run, or by the given one; None: none was run."""
    single = {name: score for name, score in scores.items() if name[0] not in set(groups)}
    for candidate in (way,) if way else row.ways:
        if mean := _mean_of(candidate, single):
            return _Measured(mean, candidate)
    return None


def _mean_of(way: Way, scores: Mapping[Name, Score]) -> Score | None:
    """The mean over all tasks of a way; None where one is missing.

    Metrics of one task score the same answers, so their standard errors are averaged; tasks are independent.
    """
    tasks = sorted({name[0] for name in scores if any(fnmatchcase(name[0], pattern) for pattern in way.tasks)})
    if len(tasks) != way.count:
        return None
    keys = [[_name_of(task, metric) for metric in way.metrics] for task in tasks]
    if any(key not in scores for of_task in keys for key in of_task):
        return None
    per_task = [[scores[key] for key in of_task] for of_task in keys]
    errors = [[score.stderr for score in of_task if score.stderr is not None] for of_task in per_task]
    complete = all(len(of_task) == len(way.metrics) for of_task in errors)
    return Score(
        value=sum(score.value for of_task in per_task for score in of_task) / (len(tasks) * len(way.metrics)),
        stderr=sqrt(sum((sum(of_task) / len(of_task)) ** 2 for of_task in errors)) / len(tasks) if complete else None,
        higher_is_better=True,
        questions=sum(of_task[0].questions for of_task in per_task),
        of=sum(of_task[0].of for of_task in per_task),
    )


def _name_of(task: str, metric_and_filter: str) -> Name:
    metric, _, filter_name = metric_and_filter.partition(",")
    return task, metric, filter_name
