"""One artifact, one record: every check in turn, each judged by a gate. Knows nothing about formats."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from devices import Device, DeviceError
from export import disk, manifest, sources
from export.errors import ExportError
from export.manifest import Manifest
from export.progress import console, stage

from . import (
    baseline,
    checks,
    comparisons,
    contamination,
    cooling,
    device_facts,
    evaluation,
    gates,
    golden,
    jobs,
    latency,
    plan_key,
    proven,
    regression,
    same_tokens,
)
from .case import Case, Setting, StoppedError, ask, ask_artifact
from .evaluation import Windows
from .generate import common_prefix
from .place import outcome_of
from .record import Accuracy, Latency, Outcome, Record


def validate(folder: Path, described: Manifest, setting: Setting) -> Record:
    """Examine an artifact and write down what was found, whatever happens on the way. Raises disk.FullError."""
    case = Case(folder, described, setting)
    case.environment = setting.place.environment()
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        with disk.writing(setting.scratch):
            examine(case)
        outcome, detail = gates.outcome_of(case.gates)
    except disk.FullError:  # says nothing of the artifact
        raise
    except StoppedError as stop:
        outcome, detail = stop.outcome, str(stop)
    except DeviceError as error:
        outcome, detail = outcome_of(error), str(error)
    except ExportError as error:
        outcome, detail = Outcome.RUN_FAIL, str(error)
    unknown = device_facts.state("")
    before, after = case.states if len(case.states) == 2 else (unknown, unknown)
    code = manifest.source_info()
    return Record(
        schema_version=4,
        run_id=setting.run_id,
        proof=proof_of(case),
        artifact=described.id,
        manifest_sha256=manifest.digest(folder),
        plan_key=plan_key.of(described, setting.evaluation),
        size_bytes=described.artifact_bytes,
        bits_per_weight=described.quantization.bits_per_weight,
        device=setting.device.name,
        emulated=setting.device.emulated,
        environment=case.environment,
        state_before=before,
        state_after=after,
        commit=code.commit,
        dirty=code.dirty,
        started_at=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 3),
        gates=tuple(case.gates),
        accuracy=accuracy_of(case),
        latency=case.latency,
        outcome=outcome,
        detail=detail,
    )


def proof_of(case: Case) -> str:
    """What this run proves, for who may leave it out next time; nothing where the device is not this machine."""
    if case.setting.device.transport.kind != "local" or case.environment is None:
        return ""
    return proven.key(case.folder, case.setting.device, case.setting.evaluation, case.environment)


def examine(case: Case) -> None:
    """Every check, cheap and safe ones first: a damaged file never reaches a native runtime."""
    check_files(case)
    check_text(case)
    check_tokenizer(case)
    check_weights(case)
    windows, probes = comparisons.prepare(case)
    files = comparisons.compute_references(case, windows, probes)
    comparisons.compare_references(case, windows.windows, files)
    comparisons.compare_artifact(case, windows, probes, files)
    check_baseline(case)
    check_conformance(case)
    check_golden(case)
    same_tokens.check(case, windows.windows, files)
    measure_speed(case, windows.windows)


def check_files(case: Case) -> None:
    """Sizes and sha256 as in the manifest."""
    with stage("files"):
        problem = checks.damaged_file(case.folder, case.manifest)
    case.gates.append(gates.count("files intact: problems", [problem] if problem else [], Outcome.DAMAGED))
    if problem:
        raise StoppedError(Outcome.DAMAGED, problem)


def check_text(case: Case) -> None:
    """Nothing of the evaluation's text was read when the recipe calibrated."""
    with stage("text", "evaluation against calibration"):
        problems = contamination.problems(case.setting.evaluation, case.manifest.plan.quant)
    case.gates.append(gates.count("evaluation text read in calibration", problems, Outcome.CONTAMINATED))
    if problems:
        raise StoppedError(Outcome.CONTAMINATED, "; ".join(problems))


def check_tokenizer(case: Case) -> None:
    """Same ids, special tokens and chat template as the checkpoint's own tokenizer."""
    texts = [evaluation.read_text(spec.file) for spec in case.setting.evaluation.texts]
    with stage("tokenizer"):
        try:
            source = sources.open_source(case.origin, case.manifest.plan.model.architecture)
        except ExportError as error:
            raise StoppedError(Outcome.SOURCE_DIFFERS, str(error)) from None
        problems = checks.tokenizer_differences(case.folder, case.manifest, source, texts)
    case.gates.append(gates.count("tokenizer: differences", problems, Outcome.TOKENIZER_DIFFERS))


def check_weights(case: Case) -> None:
    """Integers and scales of the finished file are those that were quantized once."""
    job = jobs.WeightsJob(folder=case.folder_text, source=case.setting.source, cache=case.cache_text)
    with stage("weights"):
        found = ask(case, job, "weights")
    compared = f"{found['values']:,} integers and scales compared" if found["values"] else "nothing is quantized"
    detail = compared + (f", first: {found['first']}" if found["first"] else "")
    problems = found["differing"] + len(found["missing"])
    if found["missing"]:
        detail += f", missing: {found['missing'][0]}"
    case.gates.append(gates.judge("weights: differing numbers", problems, "at most", 0, Outcome.WEIGHTS_DIFFER, detail))


def check_conformance(case: Case) -> None:
    """The cache at its edges."""
    limit = case.setting.evaluation.max_filled_context
    fill = case.manifest.contract.kv.context_length <= limit
    job = jobs.ConformanceJob(folder=case.folder_text, threads=case.setting.place.threads, fill=fill)
    with stage("cache", "last position, past it, reset" if fill else f"past its end, reset (more than {limit} slots)"):
        found = ask_artifact(case, job, "cache")
    case.gates.append(gates.count("cache: broken promises", found["failures"], Outcome.MISMATCH))


def check_golden(case: Case) -> None:
    """The exact checked-in answer, where the model has one."""
    answer = golden.find(case.manifest)
    if answer is None:
        return
    job = jobs.GenerateJob(
        folder=case.folder_text, threads=case.setting.place.threads, prompt=answer.prompt, count=len(answer.tokens)
    )
    with stage("golden", f"{len(answer.tokens)} tokens"):
        tokens = ask_artifact(case, job, "golden")["tokens"]
    same = common_prefix(tokens, answer.tokens)
    case.gates.append(gates.judge("golden tokens", same, "at least", len(answer.tokens), Outcome.MISMATCH))


def check_baseline(case: Case) -> None:
    """Size and KL as shipped against what this device's baseline holds, where one is kept."""
    assert case.environment is not None
    before = baseline.find(case.setting.device.name, case.environment, case.manifest.id)
    if before is None:
        return
    if reason := baseline.not_compared(before, plan_key.of(case.manifest, case.setting.evaluation)):
        console.print(f"  {case.manifest.id}: {reason}; `make baseline` keeps this run", style="yellow", soft_wrap=True)
        return
    case.before = before
    changes = regression.shipped(case.manifest.artifact_bytes, case.comparisons["total"], before)
    case.gates += [regression.judge(change) for change in changes]


def measure_speed(case: Case, windows: Windows) -> None:
    """Timings, against the device's budgets."""
    setting, spec = case.setting, case.setting.evaluation.speed
    longest = max(spec.prompts)
    tokens = np.resize(windows.tokens.ravel(), longest).tolist()
    job = jobs.SpeedJob(
        folder=case.folder_text,
        threads=setting.place.threads,
        tokens=tuple(tokens),
        prompts=spec.prompts,
        generate=spec.generate,
        repeats=spec.repeats,
        warmups=spec.warmups,
    )
    with stage("speed", f"{spec.repeats} repeats"):
        hot = cooling.wait(setting.place.state, setting.device.cool_down) if setting.device.cool_down else ""
        before = setting.place.state()
        raw = ask_artifact(case, job, "speed")
    if not raw["measured"]:
        return
    case.states = [before, setting.place.state()]
    case.environment = setting.place.environment()
    case.latency = latency.summarize(raw, case.manifest, setting.place.threads, setting.read_bandwidth_bytes_per_s)
    if setting.device.emulated:
        return
    judge_speed(case, case.latency, hot)


def judge_speed(case: Case, measured: Latency, hot: str) -> None:
    """Budgets of the device's YAML and, where one is kept, its baseline; noise and heat leave close calls open."""
    device = case.setting.device
    found = gates.budgets(measured, min_decode_tps=device.budgets.min_decode_tps, max_ttft_s=device.budgets.max_ttft_s)
    if case.before:
        found += [regression.judge(change) for change in regression.timed(measured, case.before)]
    case.gates += gates.in_doubt(found, measured, max_cv=device.max_cv, reason=hot)


def accuracy_of(case: Case) -> Accuracy:
    """The comparisons that were reached."""
    spec = case.setting.evaluation
    return Accuracy(
        evaluation=spec.name,
        prefill=spec.prefill,
        decode=spec.decode,
        domains=tuple(text.domain for text in spec.texts for _ in range(text.windows)),
        total=case.comparisons.get("total"),
        rewriting=case.comparisons.get("rewriting"),
        quantization=case.comparisons.get("quantization"),
        noise=case.comparisons.get("noise"),
        lowering=case.comparisons.get("lowering"),
        probe_sqnr_db=tuple(case.probe_sqnr_db),
    )


def open_artifacts(folders: Sequence[Path], device: Device) -> list[tuple[Path, Manifest]]:
    """Every folder's manifest, read before any work; one the device cannot run is refused."""
    cases = [(folder, manifest.read(folder)) for folder in folders]
    for folder, described in cases:
        if described.plan.target.name not in device.targets:
            raise ExportError(
                f"{folder}: device {device.name!r} does not run {described.plan.target.name}; "
                f"it runs {', '.join(device.targets)}"
            )
    return cases
