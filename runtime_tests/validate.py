"""Validation: every check of an artifact in turn, each judged by gates, gives one record.

Several artifacts are examined side by side; what they are timed at is measured afterwards, one alone at a time.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import devices
from devices import Device, DeviceError
from export import manifest
from export.checkpoints import whereabouts
from export.errors import ExportError, is_own
from export.host import disk, memory
from export.host.console import console, lane, stage
from export.manifest import Manifest
from export.plan import file_of

from .checks import comparisons, conformance, files, gates, limits, speed, tokens, weights
from .checks.subject import Finding, Setting, StoppedError, Subject, Timing, Turns
from .evaluation import Windows, text_file
from .evidence import baseline, proof, regression
from .evidence.record import Accuracy, Comparison, Environment, Outcome, Record, folder_text
from .evidence.regression import Reached
from .jobs.child import Child
from .places import facts, outcome_of

_Stop = tuple[Outcome, str]
"""Why a check ended all later ones: the outcome and its detail."""


@dataclass(frozen=True)
class Examined:
    """An artifact after all checks but that of its speed."""

    subject: Subject
    environment: Environment
    """When they began."""
    started: datetime
    seconds: float
    finding: Finding
    stop: _Stop | None
    notes: tuple[str, ...]

    @property
    def timed(self) -> bool:
        """Whether its speed is measured: nothing has ended the checks early, and it is no evaluator's."""
        return self.stop is None and not self.finding.evaluated


def validate(folder: Path, described: Manifest, setting: Setting) -> Record:
    """Run every check of an artifact and record the results, even where one ends early.

    Raises disk.FullError; ExportError where nothing of this checkout judges it.
    """
    return conclude(examine(folder, described, setting))


def each(artifacts: Sequence[tuple[Path, Manifest]], setting: Setting) -> Iterator[Record]:
    """The records of all artifacts in their order: examined side by side if this machine can, then timed in turns.

    Raises disk.FullError.
    """
    setting = replace(setting, turns=Turns(setting.threads))
    at_once = abreast([described for _, described in artifacts], setting, memory.free().bytes)
    if at_once == 1:
        for folder, described in artifacts:
            _announce(described, setting)
            yield validate(folder, described, setting)
        return

    def examined(name: str, artifact: tuple[Path, Manifest]) -> Examined:
        with lane(name):
            return examine(*artifact, setting)

    pool = ThreadPoolExecutor(at_once)
    try:
        with stage("examine", f"{len(artifacts)} artifacts, {at_once} at once"):
            ready = list(pool.map(examined, _lanes(artifacts), artifacts))
    finally:
        pool.shutdown(cancel_futures=True)
    for one in ready:
        if one.timed:
            _announce(one.subject.manifest, setting)
        yield conclude(one)


def _announce(described: Manifest, setting: Setting) -> None:
    console.print(f"{described.id} on {setting.device.name}", style="bold", soft_wrap=True)


def abreast(manifests: Sequence[Manifest], setting: Setting, room_bytes: int) -> int:
    """How many artifacts are examined at once: on an attached device or one core one, else as many as memory allows.

    Their jobs share the cores: where one waits, another goes on.
    """
    if setting.place.attached or setting.threads == 1:
        return 1
    largest = max(_memory_bytes(described) for described in manifests)
    return max(1, min(len(manifests), room_bytes // largest))


def _memory_bytes(described: Manifest) -> int:
    """What an examination takes at its peak: two processes, and every weight in float32 and once more on its way."""
    return 2**30 + 8 * described.architecture.parameters


def _lanes(artifacts: Sequence[tuple[Path, Manifest]]) -> list[str]:
    """Names that tell artifacts apart, of equal width: their targets', or where those do not, their folders'."""
    names = [described.plan.target.name for _, described in artifacts]
    if len(set(names)) < len(names):
        names = [folder.resolve().name for folder, _ in artifacts]
    return [f"{name:<{max(map(len, names))}}" for name in names]


def examine(folder: Path, described: Manifest, setting: Setting) -> Examined:
    """Every check that needs no quiet machine. Errors as of `validate`."""
    with setting.turns.mine(), tempfile.TemporaryDirectory(dir=setting.scratch) as own:
        return _examined(folder, described, replace(setting, scratch=Path(own)))


def _examined(folder: Path, described: Manifest, setting: Setting) -> Examined:
    setting = replace(setting, source=setting.source or whereabouts.place(described.checkpoint))
    child = Child(setting.place.settings)
    subject = Subject(folder, described, setting, limits.of(described, setting.limits), child)
    notes = *limits.notes(described, subject.judged_by, setting.place.abi), *_own_files(described, setting)
    for note in notes:
        console.print(f"  {note}", style="yellow", soft_wrap=True, markup=False)
    environment = setting.place.environment()
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        finding, stop = collect(_examine(subject, environment), setting.scratch)
    finally:
        child.close()
    return Examined(subject, environment, started, time.perf_counter() - clock, finding, stop, notes)


def conclude(examined: Examined) -> Record:
    """Time the artifact, unless a check has ended early, and record the results. Raises disk.FullError."""
    subject, finding, stop = examined.subject, examined.finding, examined.stop
    folder, described, setting = subject.folder, subject.manifest, subject.setting
    clock = time.perf_counter()
    if examined.timed and finding.windows:
        with setting.turns.mine():
            timed, stop = collect(_time(subject, finding.windows), setting.cache)
        finding += timed
    outcome, detail = stop or gates.outcome_of(finding.gates)
    timing = finding.timing or Timing(examined.environment, facts.UNKNOWN, facts.UNKNOWN, None)
    code = manifest.source_info()
    return Record(
        schema_version=4,
        run_id=setting.run_id,
        proof=_proof_of(subject, timing.environment),
        artifact=described.id,
        manifest_sha256=manifest.digest(folder),
        plan_key=proof.plan_key(described, setting.evaluation),
        size_bytes=described.artifact_bytes,
        bits_per_weight=described.quantization.bits_per_weight,
        device=setting.device.name,
        emulated=setting.device.emulated,
        environment=timing.environment,
        state_before=timing.before,
        state_after=timing.after,
        commit=code.commit,
        dirty=code.dirty,
        started_at=examined.started.isoformat(timespec="seconds"),
        seconds=round(examined.seconds + time.perf_counter() - clock, 3),
        gates=finding.gates,
        accuracy=_accuracy_of(subject, finding),
        latency=timing.latency,
        outcome=outcome,
        detail=detail,
        folder=folder_text(folder),
        notes=examined.notes,
        made=proof.made(described),
    )


def _examine(subject: Subject, environment: Environment) -> Iterator[Finding]:
    """Every check, cheap and safe ones first: a damaged file never reaches a native runtime."""
    yield files.check_files(subject)
    yield files.check_text(subject)
    yield files.check_tokenizer(subject)
    yield weights.check(subject)
    _remember_place(subject)
    cut = comparisons.cut_tokens(subject)
    windows = cut.windows.windows
    yield Finding(windows=windows)
    references = comparisons.compute_references(subject, cut)
    yield (eager := comparisons.compare_references(subject, windows, references))
    noise = eager.comparisons.get("noise")
    yield (shipped := comparisons.compare_artifact(subject, cut, references, noise))
    yield comparisons.compare_cache(subject, cut, references)
    yield _check_baseline(subject, shipped.comparisons["total"], _find_baseline(subject, environment))
    yield conformance.check_cache(subject)
    yield tokens.check_golden(subject)
    yield tokens.check_device(subject, windows, references)


def _time(subject: Subject, windows: Windows) -> Iterator[Finding]:
    yield speed.check(subject, windows)


def collect(checks: Iterator[Finding], scratch: Path) -> tuple[Finding, _Stop | None]:
    """The sum of the findings up to a check that stops the rest, and why it does. Raises disk.FullError."""
    total = Finding()
    try:
        with disk.writing(scratch):
            for finding in checks:
                total += finding
    except disk.FullError:  # not an outcome: it tells nothing about the artifact
        raise
    except StoppedError as stop:
        return total + stop.finding, (stop.outcome, str(stop))
    except DeviceError as error:
        return total, (outcome_of(error), str(error))
    except ExportError as error:
        return total, (Outcome.RUN_FAIL, str(error))
    return total, None


def _own_files(described: Manifest, setting: Setting) -> tuple[str, ...]:
    """A line where files of the current folder decide the verdict: this checkout does not vouch for them."""
    plan, evaluation = described.plan, setting.evaluation
    files = [file_of("evals", evaluation.name), *(text_file(text.file) for text in evaluation.texts)]
    files += [devices.file_of(setting.device.name)]
    if setting.limits is None:
        files += [file_of("quant", plan.quant.name), file_of("targets", plan.target.name)]
    own = ", ".join(dict.fromkeys(str(file) for file in files if is_own(file)))
    return (f"judged with {own} of the folder where it was validated, not of the checkout",) if own else ()


def _remember_place(subject: Subject) -> None:
    """A checkpoint that moved is found there from now on: by its digests it is this one."""
    checkpoint = subject.manifest.checkpoint
    whereabouts.remember(whereabouts.told(checkpoint, subject.setting.source), checkpoint.sha256)


def _find_baseline(subject: Subject, environment: Environment) -> Reached | None:
    """The artifact in this device's baseline; None, with a printed reason, where the two cannot be compared."""
    before = baseline.find(subject.setting.device.name, environment, subject.manifest.id)
    if before is None:
        return None
    if reason := baseline.not_compared(before, proof.plan_key(subject.manifest, subject.setting.evaluation)):
        line = f"  {subject.manifest.id}: {reason}; `make baseline` keeps this run"
        console.print(line, style="yellow", soft_wrap=True)
        return None
    return before


def _check_baseline(subject: Subject, total: Comparison, before: Reached | None) -> Finding:
    changes = regression.shipped(subject.manifest.artifact_bytes, total, before) if before else []
    return Finding(tuple(regression.judge(change) for change in changes))


def _proof_of(subject: Subject, environment: Environment) -> str:
    """The key by which a later run recognizes this proof; empty where the device is not this machine."""
    if subject.setting.place.attached:
        return ""
    setting = subject.setting
    return proof.key(subject.folder, setting.device, setting.evaluation, environment, subject.judged_by)


def _accuracy_of(subject: Subject, finding: Finding) -> Accuracy:
    evaluation = subject.setting.evaluation
    return Accuracy(
        evaluation=evaluation.name,
        prefill=evaluation.prefill,
        decode=evaluation.decode,
        domains=tuple(text.domain for text in evaluation.texts for _ in range(text.windows)),
        windows=finding.windows.sha256 if finding.windows else "",
        total=finding.comparisons.get("total"),
        rewriting=finding.comparisons.get("rewriting"),
        quantization=finding.comparisons.get("quantization"),
        noise=finding.comparisons.get("noise"),
        lowering=finding.comparisons.get("lowering"),
        cache=finding.comparisons.get("cache"),
        probe_sqnr_db=finding.probe_sqnr_db,
    )


def open_artifacts(folders: Sequence[Path], device: Device) -> list[tuple[Path, Manifest]]:
    """Every folder with its manifest, read before any work. Raises ExportError: the device does not run its target."""
    artifacts = [(folder, manifest.read(folder)) for folder in folders]
    for folder, described in artifacts:
        if described.plan.target.name not in device.targets:
            raise ExportError(
                f"{folder}: device {device.name!r} does not run {described.plan.target.name}; "
                f"it runs {', '.join(device.targets)}"
            )
    return artifacts
