"""Results files of lm-evaluation-harness: scores of artifacts beside those of their fp32 model, and published ones.

Scores are compared only where both models answered the same questions in the same form. What a model's makers publish,
and the tasks of the harness nearest to it, is in configs/published.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from pydantic import Field, model_validator

from export.architecture import Positive, Strict
from export.errors import ExportError
from export.plan import load_named, names

Name = tuple[str, str, str]
"""Task or group, metric, filter; `none` where answers are not filtered."""
REFERENCE = "eager"
"""The target in the facts of a fp32 model's results."""


@dataclass(frozen=True)
class Score:
    """One metric of one task or group, as lm-eval gives it: a share of 1, or a perplexity."""

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
    """An artifact's id, or the name of a fp32 model."""
    facts: Mapping[str, Any]
    """Model arguments that were recorded with the evaluation."""
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


@dataclass(frozen=True)
class Compared:
    """One artifact."""

    model: str
    newest: Results
    """The last of its results files; the others are of the same build."""
    scores: dict[Name, Score]
    references: dict[Name, Score]
    """Of the fp32 model, for those scores that have one."""
    groups: frozenset[str]
    inside: frozenset[str]
    """Members of groups that have a score of their own."""


def read(path: Path) -> Results:
    """Read one results file. Raises ExportError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = content["config"]
        facts = dict(config["model_args"])
        return Results(
            path=path,
            model=str(facts.pop("pretrained")),
            facts=facts,
            date=float(content["date"]),
            chat=bool(content["chat_template"]),
            harness=str(content["lm_eval_version"]),
            scores=dict(_scores(content)),
            members=_subtasks(content),
            truncated=sum(config.get("truncated_requests", {}).values()),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ExportError(f"{path}: not a results file of `--tasks` ({reason}); remove it") from None


def _scores(content: Mapping[str, Any]) -> Iterator[tuple[Name, Score]]:
    """Every number of a results file that is a score."""
    members = _subtasks(content)
    for task, numbers in content["results"].items():
        leaves = list(_single_tasks(task, members))
        counts = [content["n-samples"][leaf] for leaf in leaves]
        for key, value in numbers.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = numbers.get(f"{metric}_stderr,{filter_name}")
            better = content["higher_is_better"].get(leaves[0], {}).get(metric)
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


def _subtasks(content: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Group → members; a single task is no key."""
    return {name: tuple(inside) for name, inside in content.get("group_subtasks", {}).items() if inside}


def _single_tasks(name: str, members: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """The tasks that have questions: the one of that name, or all in its group."""
    return (task for task in (name, *_below(name, members)) if task not in members)


def read_all(build: Path) -> list[Results]:
    """Every results file of build/tasks, oldest first."""
    return sorted((read(path) for path in build.glob("tasks/*/results_*.json")), key=lambda results: results.date)


def retention(score: Score, reference: Score) -> float | None:
    """The score as a share of the reference's; where less is better, the inverse. None where that divides by zero."""
    part, whole = (score, reference) if score.higher_is_better else (reference, score)
    return part.value / whole.value if whole.value else None


def compare(results: Sequence[Results]) -> list[Compared]:
    """Every artifact of these results, which are given oldest first; of an artifact built again, the last build."""
    artifacts = [r for r in results if r.facts.get("target") != REFERENCE]
    references = [r for r in results if r.facts.get("target") == REFERENCE]
    newest = {r.model: r for r in artifacts}
    builds = [
        [r for r in artifacts if r.model == last.model and _share(r, last, "manifest_sha256")]
        for last in newest.values()
    ]
    return [_compare_build(build, references) for build in builds]


def _compare_build(build: Sequence[Results], references: Sequence[Results]) -> Compared:
    """Of several runs of a task the one with the most questions counts, then the newest."""
    newest = build[-1]
    chosen: dict[Name, tuple[Score, Results]] = {}
    for results in build:
        for name, score in results.scores.items():
            if name not in chosen or score.questions >= chosen[name][0].questions:
                chosen[name] = score, results
    matching = [r for r in references if _share(r, newest, "checkpoint", "context_length")]
    of_fp32 = {name: _reference_of(name, *pair, matching) for name, pair in chosen.items()}
    members = {group: inside for results in build for group, inside in results.members.items()}
    scored = {name[0] for name in chosen}
    return Compared(
        model=newest.model,
        newest=newest,
        scores={name: score for name, (score, _) in chosen.items()},
        references={name: score for name, score in of_fp32.items() if score},
        groups=frozenset(members),
        inside=frozenset(name for group in scored & members.keys() for name in _below(group, members)),
    )


def _share(a: Results, b: Results, *facts: str) -> bool:
    return all(a.facts.get(fact) == b.facts.get(fact) for fact in facts)


def _reference_of(name: Name, score: Score, results: Results, references: Sequence[Results]) -> Score | None:
    """The newest reference score on as many questions, both with or both without a chat template."""
    for reference in reversed(references):
        candidate = reference.scores.get(name)
        if candidate and candidate.questions == score.questions and reference.chat == results.chat:
            return candidate
    return None


def _below(group: str, members: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for member in members.get(group, ()):
        yield member
        yield from _below(member, members)


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

    def score(self, scores: Mapping[Name, Score], groups: Collection[str]) -> Score | None:
        """The mean over all tasks; None where one is missing.

        Metrics of one task score the same answers, so their standard errors are averaged; tasks are independent.
        """
        single = {name[0] for name in scores} - set(groups)
        tasks = sorted(task for task in single if any(fnmatchcase(task, pattern) for pattern in self.tasks))
        names = [[_name_of(task, metric) for metric in self.metrics] for task in tasks]
        if len(tasks) != self.count or any(name not in scores for of_task in names for name in of_task):
            return None
        per_task = [[scores[name] for name in of_task] for of_task in names]
        errors = [[score.stderr for score in of_task if score.stderr is not None] for of_task in per_task]
        complete = all(len(of_task) == len(self.metrics) for of_task in errors)
        return Score(
            value=mean(score.value for of_task in per_task for score in of_task),
            stderr=sqrt(sum(mean(of_task) ** 2 for of_task in errors)) / len(tasks) if complete else None,
            higher_is_better=True,
            questions=sum(of_task[0].questions for of_task in per_task),
            of=sum(of_task[0].of for of_task in per_task),
        )


class PublishedScore(Strict):
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
    def _a_way_or_a_reason(self) -> "PublishedScore":
        if bool(self.ways) == bool(self.note):
            raise ValueError(f"{self.benchmark}: give either ways or a note why there are none")
        return self


class Published(Strict):
    """One YAML of configs/published."""

    name: str
    source: str
    models: tuple[str, ...]
    """Names in configs/models."""
    rows: tuple[PublishedScore, ...]

    @model_validator(mode="after")
    def _a_score_for_each_model(self) -> "Published":
        for row in self.rows:
            if len(row.published) != len(self.models):
                raise ValueError(f"{row.benchmark}: {len(row.published)} scores for {len(self.models)} models")
        return self


def published(model: str) -> Published | None:
    """The published scores of a model of configs/models."""
    loaded = (load_named(Published, "published", name) for name in names("published"))
    return next((published for published in loaded if model in published.models), None)


def _name_of(task: str, metric_and_filter: str) -> Name:
    metric, _, filter_name = metric_and_filter.partition(",")
    return task, metric, filter_name
