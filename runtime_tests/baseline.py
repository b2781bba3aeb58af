"""Baselines: what an artifact reached on a device of one kind, kept in the repository to be compared with.

    python -m runtime_tests.baseline DEVICE      keeps the newest passing record of every artifact on that device

One file per device fingerprint (name, processor, cores, memory), so that nobody is judged by another machine's speed.
An emulated device has none: how long it takes means nothing.
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

from . import gates, record
from .record import Environment, Gate, Latency, Outcome, Record

FOLDER = Path(__file__).parent / "baselines"
RECORDS = Path("build/records/records.jsonl")
TOLERANCE = 0.10
"""A difference below this is nothing, however steady the timings."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Reached(Strict):
    """What one artifact reached once."""

    run_id: str
    commit: str
    decode_ts: float
    ttft_s: float
    cv: float


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
    if not path.is_file():
        return None
    try:
        return Baseline.model_validate_json(path.read_bytes()).artifacts.get(artifact)
    except ValidationError as error:
        raise ExportError(f"{path}: not a baseline: {explain(error)[:300]}; remove it or make it again") from None


def regression(measured: Latency, before: Reached, artifact: str) -> list[Gate]:
    """Decode rate and time to first token against the baseline, within what both runs vary by."""
    tolerance = max(TOLERANCE, 3 * max(measured.cv, before.cv))
    detail = f"{artifact}: baseline of run {before.run_id}, tolerance {tolerance:.0%}"
    decode = measured.tests[-1].avg_ts / before.decode_ts
    ttft = measured.ttft_p50_s / before.ttft_s
    return [
        gates.judge("decode against baseline", decode, "at least", 1 - tolerance, Outcome.TOO_SLOW, detail),
        gates.judge("time to first token against baseline", ttft, "at most", 1 + tolerance, Outcome.TOO_SLOW, detail),
    ]


def keep(records: list[Record], device: str) -> list[Path]:
    """Write the newest passing record of each artifact on a device into its baseline; the files written."""
    written = []
    for kept in records:
        if kept.device != device or kept.outcome is not Outcome.PASS or kept.latency is None or kept.emulated:
            continue
        path = place(device, kept.environment)
        machine = kept.environment
        baseline = (
            Baseline.model_validate_json(path.read_bytes())
            if path.is_file()
            else Baseline(
                device=device, cpu=machine.cpu, cores=machine.cores, memory_gb=memory_gb(machine), artifacts={}
            )
        )
        reached = Reached(
            run_id=kept.run_id,
            commit=kept.commit,
            decode_ts=kept.latency.tests[-1].avg_ts,
            ttft_s=kept.latency.ttft_p50_s,
            cv=kept.latency.cv,
        )
        baseline = baseline.model_copy(update={"artifacts": {**baseline.artifacts, kept.artifact: reached}})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(baseline.model_dump_json(indent=1) + "\n", encoding="utf-8")
        written.append(path)
    return sorted(set(written))


@app.command()
def main(device: Annotated[str, typer.Argument(help="a name in devices/")]) -> None:
    """Keep what the artifacts reached on DEVICE as its baseline."""
    written = keep(record.newest_run(RECORDS, device), device)
    if not written:
        raise ExportError(f"{RECORDS}: no passing record with timings of {device}; run `make {device}` first")
    for path in written:
        print(path)


if __name__ == "__main__":
    sys.exit(run(app))
