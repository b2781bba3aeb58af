"""Baselines: size, loss and speed of artifacts on one kind of device, stored in the repository for comparison.

    python -m runtime_tests.evidence.baseline DEVICE [FOLDER …] [--records FILE] [--no-speed]

stores the results of the last run, or of these artifacts, or of another machine's records.

There is one file per device fingerprint (name, processor, cores, memory), so that no machine is judged by the speed of
another. Size and loss are stored for every artifact that holds, speed only where it was steady enough to be judged and
not emulated. The speeds of several runs are stored, since the difference between runs is noise too.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

import devices
from devices import DeviceError
from export import manifest
from export.architecture import Strict
from export.build import request
from export.build.command import run as run_app
from export.errors import ExportError, explain
from export.formats import admission
from export.host import disk
from export.host.console import say
from runtime_tests.places import processors

from . import record, regression
from .record import Environment, PlanKey, Record
from .regression import Change, Reached, Speed

FOLDER = Path(__file__).parent / "baselines"
RECORDS = Path("build/records/records.jsonl")
KEPT_RUNS = 12
"""Newest runs of which an artifact's speeds are stored."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Baseline(Strict):
    """All artifacts of one device."""

    device: str
    cpu: str
    cores: int
    memory_gb: int
    artifacts: dict[str, Reached]


def place(device: str, machine: Environment) -> Path:
    """The file of a device of this kind."""
    text = f"{device}|{machine.cpu}|{machine.cores}|{memory_gb(machine)}"
    return FOLDER / f"{device}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"


def memory_gb(machine: Environment) -> int:
    """GiB, rounded: the part that the system reserves changes with its version."""
    return round(machine.memory_bytes / 2**30)


def find(device: str, machine: Environment, artifact: str) -> Reached | None:
    """The baseline of an artifact on this machine, if there is one. Raises ExportError."""
    path = place(device, machine)
    return read(path).artifacts.get(artifact) if path.is_file() else None


def read(path: Path) -> Baseline:
    """A baseline file. Raises ExportError: it is of another version."""
    try:
        return Baseline.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ExportError(
            f"{path}: not a baseline of this version: {explain(error)[:300]}; remove it, then `make baseline`"
        ) from None


def not_compared(before: Reached, key: PlanKey) -> str:
    """Why a run cannot be compared with the baseline, in one line; empty: it can."""
    differing = before.plan_key.differs_in(key)
    return f"baseline of run {before.run_id} is of another {', '.join(differing)}: not compared" if differing else ""


def keep(records: list[Record], device: str) -> list[tuple[Path, Record]]:
    """Store the results of records in the baselines of a device; the files written, each with its record.

    Artifacts that hold are stored, and those that fail against the old baseline only: to store them is to accept them.
    """
    written = []
    for run in records:
        if run.device != device or not _holds_otherwise(run) or run.accuracy.total is None:
            continue
        path, machine = place(device, run.environment), run.environment
        baseline = (
            read(path)
            if path.is_file()
            else Baseline(
                device=device, cpu=machine.cpu, cores=machine.cores, memory_gb=memory_gb(machine), artifacts={}
            )
        )
        now = reached(run, baseline.artifacts.get(run.artifact))
        baseline = baseline.model_copy(update={"artifacts": {**baseline.artifacts, run.artifact: now}})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(baseline.model_dump_json(indent=1) + "\n", encoding="utf-8")
        written.append((path, run))
    return written


def _holds_otherwise(run: Record) -> bool:
    """Whether an artifact holds, apart from its comparison with the old baseline."""
    failed = [gate for gate in run.gates if gate.verdict == "fail"]
    only_against_baseline = all(regression.AGAINST in gate.name for gate in failed)
    return run.holds or (only_against_baseline and run.outcome in {gate.fails_as for gate in failed})


def reached(run: Record, before: Reached | None = None) -> Reached:
    """The baseline's entry for a record, with the speeds of the entry before."""
    assert run.accuracy.total is not None
    return Reached(
        run_id=run.run_id,
        commit=run.commit,
        plan_key=run.plan_key,
        size_bytes=run.size_bytes,
        mean_kl=run.accuracy.total.mean_kl,
        kl_by_window=run.accuracy.total.kl_by_window,
        speeds=_speeds(run, before),
    )


def _speeds(run: Record, before: Reached | None) -> tuple[Speed, ...]:
    """The earlier speeds of the same plan and this run's, if steady."""
    same = before is not None and not before.plan_key.differs_in(run.plan_key)
    others = [speed for speed in before.speeds if speed.run_id != run.run_id] if before and same else []
    new = [regression.speed_of(run.latency, run.run_id)] if run.latency and not left_out(run) else []
    return tuple([*others, *new][-KEPT_RUNS:])


def left_out(run: Record) -> str:
    """Why a run's speed is not stored; empty: it is."""
    if run.emulated or run.latency is None:
        return "not timed"
    if not processors.is_named(run.environment.cpu):
        return f"its processor ({run.environment.cpu}) may be any"
    if run.state_before.low_power:
        return "it saved energy"
    # a run that is inconclusive only because the baseline is noisy is steady itself, and shows how large that noise is
    left_open = [gate.detail for gate in run.gates if gate.verdict == "inconclusive"]
    return next((detail for detail in left_open if not detail.endswith(regression.HIDDEN)), "")


@dataclass(frozen=True)
class Judged:
    """One artifact folder against its newest record and the baseline."""

    name: str
    """The artifact's id; the folder where it has none."""
    record: Record | None
    problem: str
    """Why there is no record of it; empty: there is one."""
    changes: tuple[Change, ...]
    """Against the baseline; empty where nothing is compared, for the reason in `note`."""
    note: str

    @property
    def holds(self) -> bool:
        """It was validated, and no gate failed."""
        return self.record is not None and self.record.holds


def judge(folder: Path, records: Path, device: str) -> Judged:
    """The newest record of exactly this build on a device; an unreadable folder is a problem, not an error."""
    try:
        described = admission.admit(folder)  # the record names the manifest only, and the manifest the files
    except ExportError as error:
        return Judged(folder.name, None, str(error), (), "")
    newest = record.newest_of(records, manifest_sha256=manifest.digest(folder), device=device)
    if newest is None:
        command = request.shell(["-m", "runtime_tests", "--device", device, str(folder)])
        problem = f"no record of this build on {device} in {records}; run `{command}`"
        return Judged(described.id, None, problem, (), "")
    changes, note = _against_baseline(newest)
    return Judged(described.id, newest, "", changes, note)


def _against_baseline(run: Record) -> tuple[tuple[Change, ...], str]:
    """The changes, or why there are none."""
    before = find(run.device, run.environment, run.artifact)
    if before is None:
        return (), "no baseline of this machine"
    if reason := not_compared(before, run.plan_key):
        return (), f"{reason}; make gate AGAINST=… compares whatever changed"
    if run.accuracy.total is None:
        return (), "nothing was measured"
    changes = regression.shipped(run.size_bytes, run.accuracy.total, before)
    return (*changes, *(regression.timed(run.timings, before) if run.timings else ())), ""


def remember(device: str, folders: Sequence[Path], records: Path) -> None:
    """Write down which builds a run is about: what was proven before and is left out is a result of it too."""
    records.parent.mkdir(parents=True, exist_ok=True)
    disk.write_text(_last(device, records), json.dumps([manifest.digest(folder) for folder in folders]) + "\n")


def _last(device: str, records: Path) -> Path:
    return records.parent / f"last-{device}.json"


def of_last_run(device: str, records: Path) -> list[Record]:
    """The newest record of each build that the last run on a device was about. Raises ExportError."""
    try:
        builds: list[str] = json.loads(_last(device, records).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ExportError(
            f"{_last(device, records)}: no record of {device}'s last run; run `make {device}` first, or give the "
            "artifacts' folders"
        ) from None
    found = [record.newest_of(records, manifest_sha256=build, device=device) for build in builds]
    return [run for run in found if run is not None]


def of_folders(device: str, folders: Sequence[Path], records: Path) -> list[Record]:
    """The newest record of each of these builds. Raises ExportError: one has none."""
    judged = [judge(folder, records, device) for folder in folders]
    if problem := next((one.problem for one in judged if one.problem), None):
        raise ExportError(problem)
    return [one.record for one in judged if one.record is not None]


def _require_one_build_each(runs: Sequence[Record]) -> None:
    """Refuse two builds of one id, of which a baseline can hold one only."""
    builds: dict[tuple[str, Path], Record] = {}
    for run in runs:
        other = builds.setdefault((run.artifact, place(run.device, run.environment)), run)
        if other.manifest_sha256 != run.manifest_sha256:
            raise ExportError(
                f"{run.artifact}: two builds, {other.folder} and {run.folder}; which is the baseline? Give its folder "
                f'(`make baseline ARTIFACTS="{run.folder}"`)'
            )


@app.command()
def main(
    device: Annotated[str, typer.Argument(help="a name in devices/")],
    folders: Annotated[list[Path] | None, typer.Argument(help="of artifacts; default: those of the last run")] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="records of another machine, as ci-artifacts publishes them; all are stored",
        ),
    ] = None,
    speed: Annotated[bool, typer.Option(help="store speeds too; not if others use the machine as well")] = True,
) -> None:
    """Store the results of the last run on DEVICE, or of some artifacts, as its baseline."""
    try:
        devices.load(device)
    except DeviceError as error:
        raise ExportError(str(error)) from None
    if folders:
        found = of_folders(device, folders, records or RECORDS)
    else:
        found = record.newest_of_each(records, device) if records else of_last_run(device, RECORDS)
    _require_one_build_each(found)
    written = keep(found if speed else [run.model_copy(update={"latency": None}) for run in found], device)
    for run in found:
        if all(stored.run_id != run.run_id or stored.artifact != run.artifact for _, stored in written):
            say(f"left out: {run.artifact}, {run.outcome.value} in run {run.run_id}: {run.detail}")
    if not written:
        raise ExportError(f"{records or RECORDS}: no record of {device} that holds; run `make {device}` first")
    for path, stored in written:
        why = left_out(stored)
        say(f"{path.name}: {stored.artifact}, run {stored.run_id}{', without speed: ' + why if why else ''}")


if __name__ == "__main__":
    sys.exit(run_app(app))
