"""A new artifact against that of the release before: quality, size and speed, whatever changed between them.

Recipe, checkpoint, tools, context and name may differ, for that is what a release changes: each artifact's loss is
measured against its own float model, over the same windows. Model family and target may not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError

from export import manifest
from export.architecture import Strict
from export.build import request
from export.errors import ExportError, explain, load_fields, validated
from export.formats import admission
from export.plan import CONFIGS
from export.toolbox import evidence, significance
from runtime_tests.tasks import results
from runtime_tests.tasks.results import Compared, Score

from . import proof, record
from .record import Comparison, Made, Outcome, Record
from .regression import KL_FLOOR_NATS, Change

LIMITS = CONFIGS / "gate.yaml"
_Share = Annotated[float, Field(ge=0, le=1)]
_Z = 1.96
"""Standard errors in half a 95 % interval."""
_MOST_SETTINGS = 3
"""Of an edited recipe, that are told."""


class Limits(Strict):
    """How much worse than the release before is too much; shares."""

    kl: _Share
    top1: _Share
    size: _Share
    task: _Share
    speed: _Share


class Turn(NamedTuple):
    """One timing of one artifact."""

    decode_ts: float
    ttft_s: float


@dataclass(frozen=True)
class Side:
    """One of the two artifacts."""

    label: str
    """Its folder, or the file of its record."""
    made: Made
    record: Record
    """Its last validation on the device."""
    folder: Path | None
    """None: only its record is there."""
    tasks: Compared | None

    @property
    def artifact(self) -> str:
        """The artifact's id."""
        return self.record.artifact


def load_limits(file: Path) -> Limits:
    """The limits in a YAML. Raises ExportError in one line."""
    return validated(Limits, load_fields(file), file)


def opened(folder: Path, records: Sequence[Path], build: Sequence[Path], device: str) -> Side:
    """An artifact folder with its last validation on a device. Raises ExportError: damaged, or never validated there.

    `build`: folders that may hold its scores of tasks.
    """
    described = admission.admit(folder)
    sha256 = manifest.digest(folder)
    found = [record.newest_of(path, manifest_sha256=sha256, device=device) for path in records]
    runs = [run for run in found if run is not None and run.accuracy.windows]
    if not runs:
        command = request.shell(["-m", "runtime_tests", "--device", device, str(folder)])
        raise ExportError(f"{folder}: no record of this build on {device} that can be compared; run `{command}` first")
    newest = max(runs, key=lambda run: run.started_at)
    return Side(str(folder), proof.made(described), newest, folder, _scores(build, sha256))


def recorded(file: Path, device: str) -> list[Side]:
    """Each artifact that a records file has a run of on a device, by the last one. Raises ExportError."""
    newest: dict[str, Side] = {}
    for line in evidence.lines(file):
        if record.field(line, "device") != device:
            continue
        try:
            run = Record.model_validate_json(line)
        except ValidationError as error:
            raise ExportError(f"{file}: not records of this version ({explain(error)[:200]})") from None
        if run.made is None or not run.accuracy.windows:
            raise ExportError(
                f"{file}: its record of {run.artifact} is of an older version, without what is compared; give the "
                "artifact's folder, validated again"
            )
        newest[run.artifact] = Side(f"{file}: {run.artifact}", run.made, run, None, None)
    if not newest:
        raise ExportError(f"{file}: no record of an artifact on {device}")
    return list(newest.values())


def before(new: Made, artifact: str, olds: Sequence[Side], against: Path) -> Side:
    """Which of the release before an artifact is compared with. Raises ExportError: none, or several might be it."""
    alike = [old for old in olds if (old.made.family, old.made.target) == (new.family, new.target)]
    if not alike:
        held = ", ".join(sorted({f"{old.made.family} for {old.made.target}" for old in olds}))
        raise ExportError(f"{against} has nothing of {new.family} for {new.target} to compare with, but {held}")
    for fitting in ([old for old in alike if old.artifact == artifact], alike):
        if len(fitting) == 1:
            return fitting[0]
    raise ExportError(
        f"{against} has several of {new.family} for {new.target}: {', '.join(sorted(old.label for old in alike))}; "
        "give the one to compare with"
    )


def changed(old: Side, new: Side) -> str:
    """What differs between the two, in one line."""
    a, b = old.made, new.made
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in ("name", "checkpoint", "context")]
    parts = [f"{name} {was} → {now}" for name, was, now in pairs if was != now]
    if settings := list(_differing(a.recipe, b.recipe)):
        more = [f"{len(settings) - _MOST_SETTINGS} more"] if len(settings) > _MOST_SETTINGS else []
        parts.append(f"recipe {b.recipe['name']}: {', '.join([*settings[:_MOST_SETTINGS], *more])}")
    if tools := list(_differing(a.tools, b.tools)):
        parts.append(f"tools {', '.join(tools)}")
    parts += [f"our code {a.code} → {b.code}"] * (a.code != b.code)
    if not parts and old.record.manifest_sha256 == new.record.manifest_sha256:
        return "nothing, the same files"
    return "; ".join(parts) or "nothing that a manifest names"


def _differing(a: dict[str, str], b: dict[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield f"{name} {a.get(name, 'none')} → {b.get(name, 'none')}"


def compared(old: Side, new: Side, limits: Limits) -> list[Change]:
    """Size, KL and top-1 as shipped, and every task that both were evaluated on.

    Raises ExportError: there is no common measure of quality.
    """
    a, b = (side.record.accuracy for side in (old, new))
    if a.total is None or b.total is None:
        side = old if a.total is None else new
        raise ExportError(f"{side.label}: its validation ended before its loss was measured ({side.record.detail})")
    if a.windows != b.windows:
        raise ExportError(
            f"{new.label} and {old.label}: no common measure, validated on different windows (evaluations "
            f"{a.evaluation} and {b.evaluation}); validate both again with the same --eval"
        )
    if len(a.total.top1_by_window) != len(b.total.top1_by_window):
        raise ExportError(
            f"{new.label} and {old.label}: no common measure, one was validated by a version that kept no top-1 of "
            "each window; validate both again"
        )
    old_mb, new_mb = old.record.size_bytes / 1e6, new.record.size_bytes / 1e6
    kl, kl_noise = a.total.mean_kl, significance.paired(a.total.kl_by_window, b.total.kl_by_window)
    floor = max(limits.kl * kl, KL_FLOOR_NATS)
    where = old.label
    return [
        Change("KL as shipped", "nats", kl, where, b.total.mean_kl, floor, kl_noise, "more", Outcome.MISMATCH),
        Change(
            *("top-1 as shipped", "of positions", a.total.top1, where, b.total.top1, limits.top1),
            *(_top1_noise(a.total, b.total), "less", Outcome.MISMATCH),
        ),
        Change("size", "MB", old_mb, where, new_mb, limits.size * old_mb, 0.0, "more", Outcome.TOO_LARGE),
        *_tasks(old, new, limits.task),
    ]


def _top1_noise(a: Comparison, b: Comparison) -> float:
    return significance.paired(a.top1_by_window, b.top1_by_window)


def timed(turns: Sequence[tuple[Turn, Turn]], limit: float, since: str) -> list[Change]:
    """Decode rate and time to first token of old and new, timed in turns: the median of each pair's ratio."""

    def change(name: str, unit: str, worse: Literal["more", "less"], pairs: Sequence[tuple[float, float]]) -> Change:
        ratios = [new / old for old, new in pairs]
        was, ratio = median(old for old, _ in pairs), median(ratios)
        low, high = significance.of_median(ratios)
        noise = was * max(ratio - low, high - ratio)
        return Change(name, unit, was, since, was * ratio, limit * was, noise, worse, Outcome.TOO_SLOW)

    return [
        change("decode", "tokens/s", "less", [(old.decode_ts, new.decode_ts) for old, new in turns]),
        change("time to first token", "s", "more", [(old.ttft_s, new.ttft_s) for old, new in turns]),
    ]


def _scores(build: Sequence[Path], manifest_sha256: str) -> Compared | None:
    """Scores of tasks of one build of an artifact, beside those of its float model."""
    every = [found for folder in build for found in results.read_all(folder)]
    own = [
        found
        for found in every
        if found.facts.get("manifest_sha256") == manifest_sha256 or found.facts.get("target") == results.REFERENCE
    ]
    return next(iter(results.compare(own)), None)


def _tasks(old: Side, new: Side, limit: float) -> Iterator[Change]:
    """Each score as a share of the float model's own, where both models answered the same questions alike."""
    if old.tasks is None or new.tasks is None or old.tasks.newest.chat != new.tasks.newest.chat:
        return
    for name in old.tasks.references:
        if name[0] in old.tasks.inside or name not in new.tasks.references:
            continue
        a, b = ((side.scores[name], side.references[name]) for side in (old.tasks, new.tasks))
        shares = results.retention(*a), results.retention(*b)
        if a[0].questions != b[0].questions or shares[0] is None or shares[1] is None:
            continue
        noise = sqrt(_variance(*a) + _variance(*b))
        label = f"{name[0]}, {name[1]}"
        yield Change(label, "of fp32", shares[0], old.label, shares[1], limit, _Z * noise, "less", Outcome.MISMATCH)


def _variance(score: Score, reference: Score) -> float:
    """Of a share of the reference's score, from the answers of the artifact: the reference is the same each time."""
    return (score.stderr / reference.value) ** 2 if score.stderr and reference.value else 0.0
