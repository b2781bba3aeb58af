"""Reads the integers and scales of an artifact back and compares them, bit for bit, with those quantized once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from export import checkpoints, formats, manifest
from export.build import skip
from export.checkpoints import Checkpoint, whereabouts
from export.checkpoints.origin import Origin
from export.errors import ExportError
from export.host.console import stage
from export.manifest import Manifest
from export.quantization import content_key, requantize
from export.quantization.store import QuantizedModel
from export.toolbox.model_checks import cache_differences
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import SourceError, WeightsJob

from . import gates
from .subject import Finding, Subject


def check(subject: Subject) -> Finding:
    """Integers and scales of the finished file are those that were quantized once."""
    job = WeightsJob(folder=subject.folder_text, source=subject.setting.source, cache=subject.cache_text)
    with stage("weights"):
        result = subject.run_here(job, "weights")
    detail = f"{result['values']:,} integers and scales compared" if result["values"] else "nothing is quantized"
    detail += f", first: {result['first']}" if result["first"] else ""
    detail += f", missing: {result['missing'][0]}" if result["missing"] else ""
    detail += f"; {result['again']}" if result["again"] else ""
    problems = result["differing"] + len(result["missing"])
    name = "weights: differing numbers"
    weights = gates.judge(name, problems, "at most", 0, Outcome.WEIGHTS_DIFFER, detail)
    return Finding((weights, gates.count("cache in the file: differences", result["cache"], Outcome.MISMATCH)))


@contextmanager
def source_of(described: Manifest, source: str | None) -> Iterator[Origin]:
    """Where an artifact's checkpoint is. Raises SourceError: nowhere, or what is wrong with it in the block."""
    try:
        origin = whereabouts.told(described.checkpoint, source)
    except ExportError as error:
        raise SourceError(Outcome.SOURCE_MISSING, str(error)) from None
    try:
        yield origin
    except ExportError as error:
        gone = any(change.is_gone for change in skip.changed_files(described.checkpoint.sha256, origin))
        raise SourceError(Outcome.SOURCE_MISSING if gone else Outcome.SOURCE_DIFFERS, str(error)) from None


def rebuild(described: Manifest, source: str | None, cache: Path) -> QuantizedModel:
    """The quantized model of an artifact, from its checkpoint and the cached integers. Raises SourceError."""
    recipe, calibrated = described.plan.quant, described.quantization.calibration
    processor = calibrated.processor if calibrated else None
    weights = checkpoint_of(described, source)
    with source_of(described, source):
        if content_key(weights, recipe, processor) != described.quantization.key:
            raise ExportError(
                f"{described.id}: quantized from another checkpoint ({weights.origin} now), or by another version of "
                "the recipe, export/quantization/ or torchao; build the artifact again"
            )
        return requantize(weights, recipe, cache, processor)


def checkpoint_of(described: Manifest, source: str | None) -> Checkpoint:
    """The checkpoint that an artifact was built from. Raises SourceError."""
    with source_of(described, source) as origin:
        weights = checkpoints.load(described.plan.model, origin)
        if weights.sha256 != described.checkpoint.sha256:
            changes = [change.text for change in skip.changed_files(described.checkpoint.sha256, origin)]
            raise ExportError(
                f"{'; '.join(changes) or origin}: not the checkpoint that {described.id} was built from; build it "
                "again, or give that one with --source and --adapter"
            )
    return weights


def compare(job: WeightsJob) -> dict[str, Any]:
    """Counts of compared and of differing numbers, the first weight with one, the names of missing weights.

    `again` says where the integers were calibrated a second time; empty: they are the first ones.
    """
    folder = Path(job.folder)
    described = manifest.read(folder)
    model = rebuild(described, job.source, Path(job.cache))
    reader, file = formats.reader(described.plan.target.backend), folder / described.plan.target.artifact
    missing = set(model.schemes.names)
    values, differing, first = 0, 0, ""
    for stored in reader.read_weights(file, model.architecture):
        missing.discard(stored.name)
        count, wrong = differences(model, stored)
        values, differing = values + count, differing + wrong
        first = first or (stored.name if wrong else "")
    return {
        "values": values,
        "differing": differing,
        "missing": sorted(missing),
        "first": first,
        "again": _calibrated_again(described, model),
        "cache": [*cache_differences(described.contract.kv, formats.contents(reader, file, model.architecture).cache)],
    }


def _calibrated_again(described: Manifest, model: QuantizedModel) -> str:
    was, now = described.quantization.calibration, model.calibration
    if was is None or now is None or was.processor == now.processor:
        return ""
    return f"calibrated on {was.processor}, here again on {now.processor}"


def differences(model: QuantizedModel, stored: formats.StoredWeight) -> tuple[int, int]:
    """How many integers and scales a stored weight has, and how many of them differ from the quantized model's."""
    expected = model.codes(stored.name)
    count = stored.qdata.size + stored.scale.size
    if expected is None:
        return count, count
    pairs = ((stored.qdata, expected.qdata.numpy()), (stored.scale, expected.scale.numpy()))
    if any(actual.shape != quantized.shape for actual, quantized in pairs):
        return count, count
    return count, sum(int(np.count_nonzero(actual != quantized)) for actual, quantized in pairs)
