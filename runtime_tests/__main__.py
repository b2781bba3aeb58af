"""The proof: `python -m runtime_tests [--device DEVICE] [--source DIR_OR_HF_ID] [--eval NAME] [FOLDER …]`.

With `--tasks NAME,…` it evaluates lm-evaluation-harness tasks instead: docs/tasks.md. `chat PATH`: docs/chat.md.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

import devices
from devices import Device, DeviceError
from export import cache, disk
from export.cli import run
from export.errors import ExportError
from export.progress import console, stage

from .attached import AttachedDevice
from .chat import command as chat_command
from .place import Place, ThisMachine
from .record import Outcome
from .tasks.run import Asked, parse

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BUILD = Path("build")


@app.command(epilog="Talk to an artifact: python -m runtime_tests chat PATH (it has --help).")
def main(  # noqa: PLR0913, PLR0917 – a command's options
    folders: Annotated[list[Path] | None, typer.Argument(help="artifact folders; default: all of build/")] = None,
    device: Annotated[str, typer.Option(help="a name in devices/")] = "host",
    source: Annotated[
        str | None, typer.Option(help="where the checkpoint is, when not where the manifest says")
    ] = None,
    eval_name: Annotated[
        str | None, typer.Option("--eval", help="a name in configs/evals; default: what the device's YAML says")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-evaluation-harness tasks to evaluate instead, as NAME,NAME …", metavar="NAMES"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="with --tasks: questions of each task")] = None,
    chat: Annotated[bool, typer.Option(help="with --tasks: apply the chat template of artifacts that have one")] = True,
    reference: Annotated[bool, typer.Option(help="with --tasks: evaluate the fp32 model too")] = True,
    skip_proven: Annotated[
        bool, typer.Option("--skip-proven", help="leave out what holds already, unchanged, on this machine")
    ] = False,
) -> None:
    """Prove what artifacts compute and how fast: exit 0 only if every gate holds."""
    from . import evaluation, proven, publish, scratch, summary, validate
    from .case import Setting

    known = load_device(device)
    if tasks is not None and eval_name:
        raise typer.BadParameter("--eval chooses what validation feeds; with --tasks the tasks do that")
    if tasks is None and (limit or not chat or not reference):
        raise typer.BadParameter("--limit, --no-chat and --no-reference go with --tasks")
    if tasks is not None:
        asked = Asked(parse(tasks), limit, chat, reference, source, devices.thread_count(known), known.time_limit_s)
        evaluate_tasks(folders or built_for(known), known, asked)
        return
    cases = validate.open_artifacts(folders or built_for(known), known)
    loaded = evaluation.load(eval_name or known.evaluation)
    if (
        skip_proven
        and here(known)
        and not (cases := proven.without(cases, known, loaded, BUILD / "records" / "records.jsonl"))
    ):
        return
    run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    with (
        scratch.folder(build_folder()) as room,
        opened(known, room) as place,
    ):
        setting = Setting(
            run_id=run_id,
            device=known,
            place=place,
            threads=devices.physical_threads(),
            evaluation=loaded,
            source=source,
            cache=BUILD / "cache",
            scratch=room,
            read_bandwidth_bytes_per_s=measure_bandwidth(known, place.threads) if here(known) else None,
        )
        place.prepare([described for _, described in cases])
        records = []
        for folder, described in cases:
            console.print(f"[bold]{described.id}[/bold] on {known.name}")
            records.append(validate.validate(folder, described, setting))
            with disk.writing(BUILD):
                publish.keep(records[-1], BUILD, folder, described)
    cache.trim(BUILD / "cache")
    with stage("report"), disk.writing(BUILD):
        page = publish.report(records, [described for _, described in cases], BUILD)
    summary.show(records, page)
    if not all(record.holds for record in records):
        raise typer.Exit(1)


def evaluate_tasks(folders: Sequence[Path], device: Device, asked: Asked) -> None:
    """The tasks on every artifact, then a table of each and the page; exit 0 only if every model was evaluated."""
    from . import publish, validate
    from .tasks import run, tables

    if not here(device):
        raise ExportError(f"--tasks runs artifacts on this machine, not on {device.name}")
    cases = validate.open_artifacts(folders, device)
    build_folder()
    compared, whole = run.evaluate(cases, asked, BUILD)
    page = publish.keep_tasks(BUILD, cases)
    for one in compared:
        tables.show(one)
    print(f"page: {page}")
    if not whole:
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
    sys.exit(run(chat_command.app if sys.argv[1:2] == [chat_command.NAME] else app))
