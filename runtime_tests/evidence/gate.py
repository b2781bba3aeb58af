"""The release gate: finds the release before, compares, and times old and new in turns where both are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from devices import Device
from export import manifest
from export.errors import ExportError
from export.formats import admission
from runtime_tests import evaluation
from runtime_tests.checks import race
from runtime_tests.places import Place

from . import proof, release
from .record import Outcome
from .regression import Change
from .release import Limits, Side

RECORDED = "only its record is there, of another run; give the artifact's folder"


@dataclass(frozen=True)
class Gated:
    """One artifact against that of the release before."""

    new: str
    """Its folder."""
    old: str = ""
    """What it was compared with; empty where there is nothing."""
    changed: str = ""
    changes: tuple[Change, ...] = ()
    problem: str = ""
    """Why it is red whatever the comparisons say; empty: they decide."""
    speed: str = ""
    """Why speed is not compared; empty: it is."""

    @property
    def worse(self) -> list[str]:
        """What fails."""
        return [change.name for change in self.changes if change.verdict == "fail"]

    @property
    def undecided(self) -> list[str]:
        """Losses that were measured beyond their limit and that noise may explain: not red for it, and never green."""
        open_ = [change for change in self.changes if change.verdict == "inconclusive"]
        return [change.name for change in open_ if change.fails_as is Outcome.MISMATCH and change.is_beyond]

    @property
    def holds(self) -> bool:
        """It was compared, and nothing is worse than its limit allows."""
        return not self.problem and not self.worse and not self.undecided and bool(self.changes)


@dataclass(frozen=True)
class Known:
    """The release before, and where results of both releases are looked for."""

    against: Path
    olds: tuple[Side, ...]
    records: tuple[Path, ...]
    scores: tuple[Path, ...]
    """Folders with `tasks/`."""
    device: Device


def known(against: Path, build: Path, records: Sequence[Path], device: Device) -> Known:
    """What there is of the release before. Raises ExportError: nothing, or it cannot be compared.

    Published releases have a folder for each artifact, and beside them `ci/records.jsonl`.
    """
    own = build / "records" / "records.jsonl"
    if against.is_file():
        if against.resolve() == own.resolve():
            raise ExportError(f"{against}: holds the new artifacts' own runs; give the records of the release before")
        return Known(against, tuple(release.recorded(against, device.name)), (own, *records), (build,), device)
    single = (against / manifest.FILE).is_file()
    folders = [against] if single else sorted(path.parent for path in against.glob(f"*/{manifest.FILE}"))
    if not folders:
        raise ExportError(f"{against}: neither an artifact folder, nor a folder of them, nor a file of records")
    root = against.parent if single else against
    files, scores = (own, root / "ci" / "records.jsonl", *records), tuple(dict.fromkeys((build, root)))
    olds = tuple(release.opened(folder, files, scores, device.name) for folder in folders)
    return Known(against, olds, files, scores, device)


def judge(folder: Path, before: Known, limits: Limits, place: Place | None) -> Gated:
    """One new artifact; what hinders its comparison is its problem. `place`: where speed is timed; None: it is not."""
    try:
        described = admission.admit(folder)
        old = release.before(proof.made(described), described.id, before.olds, before.against)
        if old.folder is not None and old.folder.resolve() == folder.resolve():
            raise ExportError(
                f"{folder}: is the very folder it would be compared with; give that of the release before"
            )
        new = release.opened(folder, before.records, before.scores, before.device.name)
        changes = release.compared(old, new, limits)
    except ExportError as error:
        return Gated(str(folder), problem=str(error))
    problem = "" if new.record.holds else f"its own validation failed: {new.record.outcome.value}: {new.record.detail}"
    speed = "it was not asked for" if place is None else RECORDED if old.folder is None else ""
    if place is not None and old.folder is not None:
        try:
            changes += _timed(old.folder, folder, before.device, place, limits.speed)
        except race.NotTimedError as error:
            speed = str(error)
        except ExportError as error:
            problem = problem or str(error)
    return Gated(str(folder), old.label, release.changed(old, new), tuple(changes), problem, speed)


def _timed(old: Path, new: Path, device: Device, place: Place, limit: float) -> list[Change]:
    if device.emulated:
        raise race.NotTimedError(f"{device.name} is emulated")
    timed = evaluation.load(device.evaluation).speed
    turns = [partial(race.turn, folder, place, timed, device.time_limit_s) for folder in (old, new)]
    return race.run(turns, lambda rounds: release.timed(rounds, limit, str(old)))
