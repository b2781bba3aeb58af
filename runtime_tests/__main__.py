"""The proof: `python -m runtime_tests [--device DEVICE] [--source DIR_OR_HF_ID] [--eval NAME] [FOLDER …]`."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

import devices
from devices import Device, DeviceError
from export.cli import run
from export.errors import ExportError
from export.progress import console, stage

from .attached import AttachedDevice
from .place import Place, ThisMachine
from .record import Outcome

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BUILD = Path("build")


@app.command()
def main(
    folders: Annotated[list[Path] | None, typer.Argument(help="artifact folders; default: all of build/")] = None,
    device: Annotated[str, typer.Option(help="a name in devices/")] = "host",
    source: Annotated[
        str | None, typer.Option(help="where the checkpoint is, when not where the manifest says")
    ] = None,
    eval_name: Annotated[
        str | None, typer.Option("--eval", help="a name in configs/evals; default: what the device's YAML says")
    ] = None,
) -> None:
    """Prove what artifacts compute and how fast: exit 0 only if every gate holds."""
    from . import evaluation, publish, summary, validate
    from .case import Setting

    known = load_device(device)
    cases = validate.open_artifacts(folders or built_for(known), known)
    loaded = evaluation.load(eval_name or known.evaluation)
    run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    with (
        tempfile.TemporaryDirectory(prefix=".runtime-tests-", dir=build_folder()) as scratch,
        opened(known, Path(scratch).resolve()) as place,
    ):
        setting = Setting(
            run_id=run_id,
            device=known,
            place=place,
            threads=devices.physical_threads(),
            evaluation=loaded,
            source=source,
            cache=BUILD / "cache",
            scratch=Path(scratch).resolve(),
            read_bandwidth_bytes_per_s=measure_bandwidth(known, place.threads) if here(known) else None,
        )
        place.prepare([described for _, described in cases])
        records = []
        for folder, described in cases:
            console.print(f"[bold]{described.id}[/bold] on {known.name}")
            records.append(validate.validate(folder, described, setting))
            publish.keep(records[-1], BUILD, folder, described)
    with stage("report"):
        page = publish.report(records, [described for _, described in cases], BUILD)
    summary.show(records, page)
    if not all(record.holds for record in records):
        raise typer.Exit(1)


def load_device(name: str) -> Device:
    """The device, or one line of what is known."""
    try:
        return devices.load(name)
    except DeviceError as error:
        raise ExportError(str(error)) from None


def built_for(device: Device) -> list[Path]:
    """Every artifact folder of build/ that the device can run; the others are named."""
    from export import manifest

    fit = []
    for path in sorted(BUILD.glob(f"*/{manifest.FILE}")):
        target = manifest.read(path.parent).plan.target.name
        if target in device.targets:
            fit.append(path.parent)
        else:
            console.print(f"left out: {path.parent} ({device.name} does not run {target})", style="yellow")
    if not fit:
        raise ExportError(f"no artifact for {device.name} in {BUILD}/; make one with `python -m export`")
    return fit


def build_folder() -> Path:
    """build/, made when missing; its disk holds logits for as long as the run lasts."""
    BUILD.mkdir(exist_ok=True)
    if shutil.disk_usage(BUILD).free < 2**30:
        raise ExportError(f"{BUILD.resolve()}: less than 1 GiB free; a run keeps logits there while it compares them")
    return BUILD


def here(device: Device) -> bool:
    """Whether it is the machine that runs this."""
    return device.transport.kind == "local"


@contextmanager
def opened(device: Device, scratch: Path) -> Iterator[Place]:
    """Where artifacts run; an attached device is held alone until the end."""
    if here(device):
        yield ThisMachine(devices.thread_count(device))
        return
    try:
        transport = devices.open_transport(device)
        with closing(transport), transport.lock():
            place = AttachedDevice(device, transport, scratch)
            try:
                yield place
            finally:
                place.tidy()
    except DeviceError as error:
        raise ExportError(str(error)) from None


def measure_bandwidth(device: Device, threads: int) -> float:
    """Memory read bandwidth, once per run."""
    from . import isolation, jobs

    with stage("memory", "read bandwidth"):
        ended = isolation.run(jobs.BandwidthJob(threads=threads), limit_s=device.time_limit_s)
    if ended.outcome is not Outcome.PASS:
        raise ExportError(f"the memory bandwidth of this machine cannot be measured: {ended.detail}")
    return float(ended.result["bytes_per_s"])


if __name__ == "__main__":
    sys.exit(run(app))
