"""An artifact's scores beside those of the fp32 model of its checkpoint, on the same questions asked the same way."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .results import Name, Results, Score

REFERENCE = "eager"
"""What results of a fp32 model say as their target."""


@dataclass(frozen=True)
class Compared:
    """One artifact."""

    model: str
    newest: Results
    """The last of its results files; the others are of the same build."""
    scores: dict[Name, Score]
    references: dict[Name, Score]
    """Those there are."""
    groups: frozenset[str]
    inside: frozenset[str]
    """Tasks and groups that a group with a score of its own holds."""


def compare(kept: Sequence[Results]) -> list[Compared]:
    """Every artifact of these results, oldest results first; of an artifact that was built again, the last build."""
    artifacts = [one for one in kept if one.facts.get("target") != REFERENCE]
    references = [one for one in kept if one.facts.get("target") == REFERENCE]
    last = {one.model: one for one in artifacts}
    return [
        compare_one([one for one in artifacts if same(one, newest, "manifest_sha256", model=True)], references)
        for newest in last.values()
    ]


def compare_one(of_artifact: Sequence[Results], references: Sequence[Results]) -> Compared:
    """Of several runs of a task the one with the most questions counts, then the newest."""
    newest = of_artifact[-1]
    chosen: dict[Name, tuple[Score, Results]] = {}
    for results in of_artifact:
        for name, score in results.scores.items():
            if name not in chosen or score.questions >= chosen[name][0].questions:
                chosen[name] = score, results
    matching = [one for one in references if same(one, newest, "checkpoint") and same(one, newest, "context_length")]
    found = {name: reference_of(name, *pair, matching) for name, pair in chosen.items()}
    members = {group: inside for results in of_artifact for group, inside in results.members.items()}
    scored = {name[0] for name in chosen}
    return Compared(
        model=newest.model,
        newest=newest,
        scores={name: score for name, (score, _) in chosen.items()},
        references={name: score for name, score in found.items() if score},
        groups=frozenset(members),
        inside=frozenset(one for group in scored & members.keys() for one in below(group, members)),
    )


def same(one: Results, other: Results, fact: str, *, model: bool = False) -> bool:
    """Whether two results say the same of a fact, and of the model where that is asked."""
    return one.facts.get(fact) == other.facts.get(fact) and (not model or one.model == other.model)


def reference_of(name: Name, score: Score, results: Results, references: Sequence[Results]) -> Score | None:
    """The newest reference score on as many questions, asked with or without a chat template alike."""
    for one in reversed(references):
        found = one.scores.get(name)
        if found and found.questions == score.questions and one.chat == results.chat:
            return found
    return None


def below(group: str, members: dict[str, tuple[str, ...]]) -> Iterable[str]:
    """Everything inside a group."""
    for member in members.get(group, ()):
        yield member
        yield from below(member, members)
