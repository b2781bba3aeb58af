"""Baselines: what an artifact reached on a device of one kind, kept in the repository to be compared with.

    python -m runtime_tests.baseline DEVICE [--records FILE] [--no-speed]    keeps what the last run there reached

One file per device fingerprint (name, processor, cores, memory), so that nobody is judged by another machine's speed.
Size and accuracy are kept of every artifact that holds, speed only where it was measured and steady enough to judge:
how long an emulated device takes means nothing. Speeds of several runs gather: how much they differ is noise as well.
"""

import hashlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from export.cli import run
from export.errors import ExportError
from export.plan import Strict, explain

from . import record, regression
from .record import Environment, Outcome, PlanKey, Record
from .regression import Reached, Speed

FOLDER = Path(__file__).parent / "baselines"
RECORDS = Path("build/records/records.jsonl")
KEPT_RUNS = 12
"""Of one artifact's speeds; older ones go."""
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
    """Memory without the part that the system keeps for itself, which changes with its version."""
    return round(machine.memory_bytes / 2**30)


def find(device: str, machine: Environment, artifact: str) -> Reached | None:
    """What the artifact reached here before; None where nothing was kept."""
    path = place(device, machine)
    return read(path).artifacts.get(artifact) if path.is_file() else None


def read(path: Path) -> Baseline:
    """One file, strictly."""
    try:
        return Baseline.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ExportError(
            f"{path}: not a baseline of this version: {explain(error)[:300]}; remove it, then `make baseline`"
        ) from None


def not_compared(before: Reached, key: PlanKey) -> str:
    """Why a run has nothing to do with the baseline, in a line; empty: it has."""
    other = before.plan_key.differs_in(key)
    return f"baseline of run {before.run_id} is of another {', '.join(other)}: not compared" if other else ""


def keep(records: list[Record], device: str) -> list[tuple[Path, Record]]:
    """Write what each artifact reached on a device into its baseline; the files written, and from which records.

    Of those that hold, and of those that only fail against the baseline before: keeping them is how that is accepted.
    """
    written = []
    for kept in records:
        if kept.device != device or not holds_otherwise(kept) or kept.accuracy.total is None:
            continue
        path, machine = place(device, kept.environment), kept.environment
        baseline = (
            read(path)
            if path.is_file()
            else Baseline(
                device=device, cpu=machine.cpu, cores=machine.cores, memory_gb=memory_gb(machine), artifacts={}
            )
        )
        now = reached(kept, baseline.artifacts.get(kept.artifact))
        baseline = baseline.model_copy(update={"artifacts": {**baseline.artifacts, kept.artifact: now}})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(baseline.model_dump_json(indent=1) + "\n", encoding="utf-8")
        written.append((path, kept))
    return written


def holds_otherwise(kept: Record) -> bool:
    """Whether nothing is wrong with an artifact but what the baseline says."""
    failed = [gate for gate in kept.gates if gate.verdict == "fail"]
    only_here = all(regression.AGAINST in gate.name for gate in failed)
    return kept.holds or (only_here and kept.outcome in {gate.fails_as for gate in failed})


def reached(kept: Record, before: Reached | None = None) -> Reached:
    """What a baseline holds of a record, and of the speeds it held before."""
    assert kept.accuracy.total is not None
    return Reached(
        run_id=kept.run_id,
        commit=kept.commit,
        plan_key=kept.plan_key,
        size_bytes=kept.size_bytes,
        mean_kl=kept.accuracy.total.mean_kl,
        kl_by_window=kept.accuracy.total.kl_by_window,
        speeds=speeds(kept, before),
    )


def speeds(kept: Record, before: Reached | None) -> tuple[Speed, ...]:
    """Those before and this run's, where it was steady; this run's alone where it is slower than noise explains."""
    slower = any(gate.verdict == "fail" and gate.fails_as is Outcome.TOO_SLOW for gate in kept.gates)
    same = before is not None and not before.plan_key.differs_in(kept.plan_key) and not slower
    others = [speed for speed in before.speeds if speed.run_id != kept.run_id] if before and same else []
    new = [regression.speed_of(kept.latency, kept.run_id)] if kept.latency and not unsteady(kept) else []
    return tuple([*others, *new][-KEPT_RUNS:])


def unsteady(kept: Record) -> str:
    """Why a run's speed is not kept; empty: it is."""
    if kept.emulated or kept.latency is None:
        return "not timed"
    # a run that only the baseline's noise left open is as good as any, and shows how large that noise is
    left_open = [gate.detail for gate in kept.gates if gate.verdict == "inconclusive"]
    return next((detail for detail in left_open if not detail.endswith(regression.HIDDEN)), "")


@app.command()
def main(
    device: Annotated[str, typer.Argument(help="a name in devices/")],
    records: Annotated[Path, typer.Option(help="of the run that is kept; another machine's too")] = RECORDS,
    speed: Annotated[bool, typer.Option(help="keep speeds too; not where others use the machine as well")] = True,
) -> None:
    """Keep what the artifacts reached on DEVICE as its baseline."""
    newest = record.newest_run(records, device)
    written = keep(newest if speed else [one.model_copy(update={"latency": None}) for one in newest], device)
    if not written:
        raise ExportError(f"{records}: no record of {device} that holds; run `make {device}` first")
    for path, kept in written:
        print(f"{path.name}: {kept.artifact}{', without speed: ' + why if (why := unsteady(kept)) else ''}")


if __name__ == "__main__":
    sys.exit(run(app))
