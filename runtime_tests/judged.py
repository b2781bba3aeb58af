"""An artifact, its newest record on a device, and how that stands against the baseline. Reads only."""

from dataclasses import dataclass
from pathlib import Path

from export import manifest
from export.errors import ExportError

from . import baseline, regression
from . import record as records_file
from .record import Record
from .regression import Change


@dataclass(frozen=True)
class Judged:
    """What is known of one artifact folder."""

    name: str
    """The artifact's id; the folder where it has none."""
    record: Record | None
    problem: str
    """Why there is no record to judge by; empty: there is one."""
    changes: tuple[Change, ...]
    """Against the baseline; empty where nothing is compared, `note` says why."""
    note: str

    @property
    def holds(self) -> bool:
        """It was validated, and no gate failed."""
        return self.record is not None and self.record.holds


def judge(folder: Path, records: Path, device: str) -> Judged:
    """The newest record of exactly this build on a device; one that is missing or unreadable is a problem, no error."""
    try:
        described = manifest.read(folder)
        manifest.verify_files(folder, described)  # a record is about files, it names their manifest only
    except ExportError as error:
        return Judged(folder.name, None, str(error), (), "")
    found = records_file.newest_on(records, manifest.digest(folder), device)
    if found is None:
        problem = f"no record of this build on {device} in {records}; run `python -m runtime_tests --device {device}`"
        return Judged(described.id, None, problem, (), "")
    changes, note = against_baseline(found)
    return Judged(described.id, found, "", changes, note)


def against_baseline(found: Record) -> tuple[tuple[Change, ...], str]:
    """The changes, or why there are none."""
    before = baseline.find(found.device, found.environment, found.artifact)
    if before is None:
        return (), "no baseline of this machine"
    if reason := baseline.not_compared(before, found.plan_key):
        return (), reason
    if found.accuracy.total is None:
        return (), "nothing was measured"
    changes = regression.shipped(found.size_bytes, found.accuracy.total, before)
    return (*changes, *(regression.timed(found.timings, before) if found.timings else ())), ""
