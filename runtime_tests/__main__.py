"""The proof: `python -m runtime_tests [--device DEVICE] [--source DIR_OR_HF_ID] [--eval NAME] [FOLDER …]` validates.

With `--tasks NAME,…` it evaluates lm-evaluation-harness tasks instead: docs/tasks.md. `chat PATH`: docs/chat.md.
`trace PATH` finds the layer that is wrong: docs/nonsense.md.

For example:

python -m runtime_tests build/smollm2-135m_int4-g32-gptq_onnx-cpu

python -m runtime_tests --device pixel-8 build/smollm2-135m_int4-g32-gptq_executorch-xnnpack

python -m runtime_tests chat build/smollm2-135m_int4-g32-gptq_onnx-cpu
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

import devices
from devices import Device, DeviceError
from export import manifest
from export.build.command import Timings, run, with_default
from export.checkpoints.origin import absolute, chosen_origin
from export.errors import ExportError
from export.host import disk
from export.host.console import console, say, stage

from .chat.command import chat as chat_with
from .evidence.record import Outcome, Record
from .places import Place, ThisMachine, environment, readiness
from .places.remote import AttachedDevice
from .tasks.run import TaskOptions, parse

if TYPE_CHECKING:  # `ready` and `chat` need neither
    from .checks.limits import Limits
    from .evaluation import Evaluation

app = typer.Typer(cls=with_default("validate"), help=__doc__, add_completion=False, pretty_exceptions_enable=False)
app.command("chat")(chat_with)
BUILD = Path("build")
"""Below the current folder: what a user looks at."""
CACHE = manifest.ROOT / "build" / "cache"
"""That of the builds: found by contents, so it serves every folder that a user works in."""
_Source = Annotated[
    str | None, typer.Option(help="where the checkpoint is; default: where the artifact was built from")
]
_Adapter = Annotated[
    Path | None, typer.Option(help="where the adapter is that was merged into --source, or into the base it names")
]
_Eval = Annotated[
    str | None, typer.Option("--eval", help="a name in configs/evals; default: the one in the device's YAML")
]
_LimitsFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="YAML of limits that judge instead of those in configs/"),
]
_SkipProven = Annotated[
    bool, typer.Option("--skip-proven", help="skip artifacts that passed on this machine and have not changed since")
]


@app.command("validate")
def main(  # noqa: PLR0913, PLR0917 – a command's options
    folders: Annotated[list[Path] | None, typer.Argument(help="artifact folders; default: all of build/")] = None,
    device: Annotated[str, typer.Option(help="a name in devices/")] = "host",
    source: _Source = None,
    adapter: _Adapter = None,
    eval_name: _Eval = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-evaluation-harness tasks to evaluate instead, as NAME,NAME …", metavar="NAMES"),
    ] = None,
    limits: _LimitsFile = None,
    limit: Annotated[int | None, typer.Option(min=1, help="with --tasks: questions of each task")] = None,
    chat: Annotated[bool, typer.Option(help="with --tasks: apply the chat template of artifacts that have one")] = True,
    reference: Annotated[bool, typer.Option(help="with --tasks: evaluate the fp32 model too")] = True,
    skip_proven: _SkipProven = False,
    timings: Timings = False,
) -> None:
    """Prove what artifacts compute and how fast: exit 0 only if every gate holds."""
    del timings  # its own doing
    known = _load_device(device)
    source = _given_source(source, adapter)
    if tasks is None:
        if limit or not chat or not reference:
            raise typer.BadParameter("--limit, --no-chat and --no-reference go with --tasks")
        given = _Given(eval_name or known.evaluation, source, limits, skip_proven)
        if not all(record.holds for record in _validate(folders or _built_for(known), known, given)):
            raise typer.Exit(1)
    elif eval_name:
        raise typer.BadParameter("--eval chooses what validation feeds; with --tasks the tasks do that")
    elif limits:
        raise typer.BadParameter("--limits judges a validation; scores of --tasks are not judged")
    else:
        options = TaskOptions(
            parse(tasks), limit, chat, reference, source, environment.threads(known), known.time_limit_s
        )
        _evaluate_tasks(folders or _built_for(known), known, options)


@app.command("gate")
def gate(  # noqa: PLR0913, PLR0917 – a command's options
    folders: Annotated[list[Path], typer.Argument(help="new artifacts, validated")],
    against: Annotated[
        Path, typer.Option(help="the release before: an artifact folder, a folder of them, or a file of their records")
    ],
    device: Annotated[str, typer.Option(help="a name in devices/: where they were validated and are timed")] = "host",
    limits: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="YAML of limits; default: configs/gate.yaml")
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="more files of records; those in build/ and beside AGAINST are known"),
    ] = None,
    speed: Annotated[bool, typer.Option(help="time old and new in turns, where the old one's folder is there")] = True,
    out: Annotated[Path, typer.Option(help="where gate.md goes")] = BUILD / "ci",
) -> None:
    """Compare artifacts with the release before, whatever changed: exit 0 only if nothing is worse than its limit."""
    from .evidence import gate as releases
    from .evidence import release
    from .places import scratch
    from .reports import ci
    from .reports import release as page

    allowed = release.load_limits(limits or release.LIMITS)
    before = releases.known(against, BUILD, records or [], _load_device(device))
    with scratch.folder(_build_folder()) as working, opened(before.device, working) as place:
        place.prepare([manifest.read(folder) for folder in folders])
        gated = [releases.judge(folder, before, allowed, place if speed else None) for folder in folders]
    text = page.render(gated)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gate.md").write_text(text, encoding="utf-8")
    ci.append(text)
    say(*unescape(text).split("\n"))
    if not all(one.holds for one in gated):
        raise typer.Exit(1)


@app.command("trace")
def trace(
    folder: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="an artifact folder")],
    device: Annotated[str, typer.Option(help="a name in devices/")] = "host",
    source: _Source = None,
    adapter: _Adapter = None,
    out: Annotated[Path | None, typer.Option(help="folder of the page; default: build/trace/ID")] = None,
) -> None:
    """Find the first layer of an artifact that leaves the reference: exit 0 only if none does."""
    from .sessions.trace import page, run

    known = _load_device(device)
    if not here(known):
        raise ExportError(
            f"{device}: layers are traced on this machine only; `python -m runtime_tests --device {device} {folder}` "
            "compares the logits there"
        )
    found = run.trace(folder, known, _given_source(source, adapter), disk.cache_folder(CACHE))
    page.show(found)
    with disk.writing(_build_folder()):
        say(f"page: {page.write(found, out or BUILD / 'trace' / found.artifact)}")
    if found.first:
        raise typer.Exit(1)


@app.command("ready")
def ready(  # noqa: PLR0913, PLR0917 – a command's options
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="a name in devices/")],
    source: _Source = None,
    adapter: _Adapter = None,
    eval_name: _Eval = None,
    limits: _LimitsFile = None,
    skip_proven: _SkipProven = False,
    timings: Timings = False,
) -> None:
    """Exit 0 if a validation with these options could begin: the device answers, and this machine can make its runner.

    Example: python -m runtime_tests ready pixel-8
    """
    del skip_proven, timings  # every value of them is one
    known = _load_device(device)
    _given_source(source, adapter)
    _judging(eval_name or known.evaluation, limits)
    readiness.require(known)
    _build_folder()


def _judging(eval_name: str, limits_file: Path | None) -> "tuple[Evaluation, Limits | None]":
    """What is fed, and the limits that judge instead of this checkout's."""
    from . import evaluation
    from .checks import limits

    return evaluation.load(eval_name), limits.load(limits_file) if limits_file else None


class _Given(NamedTuple):
    """What the command's options say about a validation."""

    eval_name: str
    source: str | None
    limits: Path | None
    skip_proven: bool


def proven(folders: Sequence[Path], device: str, source: str | Path | None, eval_name: str | None) -> list[Record]:
    """Validate artifacts and give their records; `runtime_tests.prove` says more."""
    known = _load_device(device)
    given = _Given(eval_name or known.evaluation, _given_source(source, None), None, skip_proven=False)
    return _validate(folders, known, given)


def _validate(folders: Sequence[Path], device: Device, given: _Given) -> list[Record]:
    """Every artifact in turn, then the report; the records, without those of artifacts that were proven before."""
    from . import validate
    from .checks import limits
    from .checks.subject import Setting
    from .evidence import baseline, proof
    from .places import scratch
    from .reports import publication, summary

    artifacts = validate.open_artifacts(folders, device)
    loaded, judging = _judging(given.eval_name, given.limits)
    for _, described in artifacts:
        limits.of(described, judging)  # or it is refused before any work
    records_file = BUILD / "records" / "records.jsonl"
    _build_folder()

    def remember() -> None:
        with disk.writing(BUILD):
            baseline.remember(device.name, folders, records_file)

    if given.skip_proven and here(device):
        artifacts = proof.without(artifacts, device, loaded, records_file, judging)
        if not artifacts:
            remember()
            return []
    cache = disk.cache_folder(CACHE)
    run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    with scratch.folder(BUILD) as logits, opened(device, logits) as place:
        remember()  # a device that does not answer is no run
        setting = Setting(
            run_id=run_id,
            device=device,
            place=place,
            threads=environment.threads(),
            evaluation=loaded,
            source=given.source,
            limits=judging,
            cache=cache,
            scratch=logits,
            read_bandwidth_bytes_per_s=_measure_bandwidth(device, place.threads) if here(device) else None,
        )
        place.prepare([described for _, described in artifacts])
        records = []
        for (folder, described), record in zip(artifacts, validate.each(artifacts, setting), strict=True):
            records.append(record)
            with disk.writing(BUILD):
                publication.keep(record, BUILD, folder, described)
    disk.trim(cache)
    with stage("report"), disk.writing(BUILD):
        page = publication.report(records, [described for _, described in artifacts], BUILD)
    summary.show(records, page)
    return records


def _evaluate_tasks(folders: Sequence[Path], device: Device, options: TaskOptions) -> None:
    """The tasks on every artifact, then a table of each and the page; exit 0 only if every model was evaluated."""
    from . import validate
    from .reports import publication
    from .tasks import run, tables

    if not here(device):
        raise ExportError(f"--tasks runs artifacts on this machine, not on {device.name}")
    artifacts = validate.open_artifacts(folders, device)
    _build_folder()
    comparisons, complete = run.evaluate(artifacts, options, BUILD)
    page = publication.keep_tasks(BUILD, artifacts)
    for comparison in comparisons:
        tables.show(comparison)
    say(f"page: {page}")
    if not complete:
        raise typer.Exit(1)


def _given_source(source: str | Path | None, adapter: Path | None) -> str | None:
    """The options' origin, for jobs."""
    origin = chosen_origin(source, adapter)
    return None if origin is None else absolute(origin)


def _load_device(name: str) -> Device:
    try:
        return devices.load(name)
    except DeviceError as error:
        raise ExportError(str(error)) from None


def _built_for(device: Device) -> list[Path]:
    """Every artifact folder of build/ that the device can run; a line is printed for each of the rest."""
    folders = []
    for path in sorted(BUILD.glob(f"*/{manifest.FILE}")):
        target = manifest.read(path.parent).plan.target.name
        if target in device.targets:
            folders.append(path.parent)
        else:
            line = f"left out: {path.parent} ({device.name} does not run {target})"
            console.print(line, style="yellow", soft_wrap=True)
    if not folders:
        raise ExportError(f"no artifact for {device.name} in {BUILD}/; make one with `python -m export`")
    return folders


def _build_folder() -> Path:
    """build/, created if missing, on a disk with room for the logits of a run."""
    try:
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=BUILD):
            pass
    except OSError as error:
        raise ExportError(
            f"{BUILD.resolve()}: cannot be written ({error.strerror}); records go there: run this in a folder of yours"
        ) from None
    if shutil.disk_usage(BUILD).free < 2**30:
        raise ExportError(f"{BUILD.resolve()}: less than 1 GiB free; a run needs room there for logits")
    return BUILD


def here(device: Device) -> bool:
    """Whether it is the machine that runs this."""
    return not device.attached


@contextmanager
def opened(device: Device, scratch: Path) -> Iterator[Place]:
    """The place where artifacts run; an attached device is locked until the end."""
    if here(device):
        yield ThisMachine(environment.threads(device), device.compute_units)
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


def _measure_bandwidth(device: Device, threads: int) -> float:
    from . import jobs
    from .jobs import isolation

    with stage("memory", "read bandwidth"):
        ended = isolation.run(jobs.BandwidthJob(threads=threads), limit_s=device.time_limit_s)
    if ended.outcome is not Outcome.PASS:
        raise ExportError(f"the memory bandwidth of this machine cannot be measured: {ended.detail}")
    return float(ended.result["bytes_per_s"])


if __name__ == "__main__":
    sys.exit(run(app))
