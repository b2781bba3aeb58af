"""The page over all artifacts and all runs, from the records that build/ holds, of older versions too."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from export import manifest
from export.plan import Name
from export.toolbox import evidence
from export.toolbox.tables import NONE
from runtime_tests.checks import loss
from runtime_tests.evidence.record import folder_text

from . import templates

_TEMPLATE = Path(__file__).parent / "overview.html.j2"
RECORDS = Path("records", "records.jsonl")
"""In build/."""
MOST_RUNS = 20
"""Earlier runs that a page lists; the page over all artifacts lists every one."""


class Entry(evidence.Validation):
    """What these pages show of a record."""

    run_id: Name
    artifact: str
    size_bytes: int
    folder: str = ""

    @property
    def css(self) -> str:
        """Class of its verdict's colour."""
        return self.outcome if self.holds else "fail"


class Run(NamedTuple):
    """One run of validation; its page is `reports/RUN_ID/index.html` in build/."""

    run_id: str
    entries: Sequence[Entry]
    has_page: bool


class _Row(NamedTuple):
    """One artifact on one device."""

    artifact: str
    folder: str
    newest: Entry | None
    """None: never validated."""
    note: str
    """What has become of the folder since; may be empty."""


def entries(build: Path) -> list[Entry]:
    """Every record that can be read, oldest first."""
    found = []
    for line in evidence.lines(build / RECORDS):
        try:
            found.append(Entry.model_validate_json(line))
        except ValidationError:  # a version without the fields needed
            continue
    return found


def runs(build: Path, known: Sequence[Entry]) -> list[Run]:
    """Newest first."""
    by_id: dict[str, list[Entry]] = {}
    for entry in known:
        by_id.setdefault(entry.run_id, []).append(entry)
    pages = build / "reports"
    found = [Run(run_id, listed, (pages / run_id / "index.html").is_file()) for run_id, listed in by_id.items()]
    return sorted(found, key=lambda run: run.run_id, reverse=True)


def render(build: Path, known: Sequence[Entry], listed: Sequence[Run]) -> str:
    """The page."""
    rows = _rows(build, known)
    failed = sum(1 for row in rows if row.newest and not row.newest.holds)
    return templates.render(
        _TEMPLATE,
        rows=rows,
        failed=failed,
        runs=listed,
        with_page={run.run_id for run in listed if run.has_page},
        nats=loss.nats,
        absent=NONE,
        decode=_decode,
    )


def _rows(build: Path, known: Sequence[Entry]) -> list[_Row]:
    """The last record of each folder and device, then folders of build/ without a record; by name and path."""
    built = {path.parent: manifest.digest(path.parent) for path in sorted(build.glob(f"*/{manifest.FILE}"))}
    by_digest = {digest: folder_text(folder) for folder, digest in built.items()}
    newest: dict[tuple[str, str, str], Entry] = {}
    for entry in known:
        folder = entry.folder or by_digest.get(entry.manifest_sha256, "")
        newest[entry.artifact, folder, entry.device] = entry
    rows = [_Row(name, folder, entry, _since(folder, entry)) for (name, folder, _), entry in newest.items()]
    validated = {row.folder for row in rows}
    rows += [
        _Row(manifest.read_id(path) or path.name, folder_text(path), None, "not validated")
        for path in built
        if folder_text(path) not in validated
    ]
    return sorted(rows, key=lambda row: (row.artifact, row.folder, row.newest.device if row.newest else ""))


def _since(folder: str, entry: Entry) -> str:
    """Whether the record is still about what lies in the folder."""
    if not folder:
        return "folder unknown"
    if not (Path(folder) / manifest.FILE).is_file():
        return "the folder is gone"
    return "" if manifest.digest(Path(folder)) == entry.manifest_sha256 else "built again since: not validated"


def _decode(entry: Entry) -> str:
    """Tokens per second, where they count."""
    timings = entry.latency
    return f"{timings.tests[-1].avg_ts:,.1f}" if timings and timings.tests and entry.timed else NONE
