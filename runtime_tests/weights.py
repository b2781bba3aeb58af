"""Proof that the artifact holds the integers and scales that were quantized once: read back, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np

from export import backends, checkpoint, manifest
from export.checkpoint import Checkpoint
from export.errors import ExportError
from export.manifest import Manifest
from export.quantize import QuantizedModel, quantize

from .jobs import SourceDiffersError, WeightsJob


def rebuild(described: Manifest, source: str | None, cache: Path) -> QuantizedModel:
    """The quantized model an artifact was made from, out of its checkpoint; raises SourceDiffersError."""
    try:
        return requantize(described, source, cache)
    except ExportError as error:
        raise SourceDiffersError(str(error)) from None


def requantize(described: Manifest, source: str | None, cache: Path) -> QuantizedModel:
    """Quantize as the artifact's build did, reusing its integers; other weights or another quantizer are refused."""
    weights = checkpoint_of(described, source)
    model = quantize(weights, described.plan.quant, cache)
    if model.key != described.quantization.key:
        raise ExportError(
            f"{described.id}: quantized from another checkpoint ({weights.origin} now), or by another version of the "
            "recipe, export/quantize.py or torchao; build the artifact again"
        )
    return model


def checkpoint_of(described: Manifest, source: str | None) -> Checkpoint:
    """The checkpoint an artifact was made from; another one is refused."""
    weights = checkpoint.load(described.plan.model, source or described.checkpoint.origin)
    if weights.sha256 != described.checkpoint.sha256:
        raise ExportError(
            f"{weights.origin}: not the checkpoint of {described.id} (sha256); give the one with --source"
        )
    return weights


def compare(job: WeightsJob) -> dict[str, Any]:
    """Count of quantized tensors and numbers, and of those that differ."""
    folder = Path(job.folder)
    described = manifest.read(folder)
    model = rebuild(described, job.source, Path(job.cache))
    backend = backends.load(described.plan.target.backend)
    missing = set(model.schemes.names)
    values, differing, first = 0, 0, ""
    for stored in backend.read_weights(folder / described.plan.target.artifact, model.architecture):
        missing.discard(stored.name)
        count, wrong = differences(model, stored)
        values, differing = values + count, differing + wrong
        first = first or (stored.name if wrong else "")
    return {"values": values, "differing": differing, "missing": sorted(missing), "first": first}


def differences(model: QuantizedModel, stored: backends.StoredWeight) -> tuple[int, int]:
    """Integers and scales of one stored weight, and how many are not the quantized model's."""
    expected = model.codes(stored.name)
    count = stored.qdata.size + stored.scale.size
    if expected is None:
        return count, count
    pairs = ((stored.qdata, expected[0].numpy()), (stored.scale, expected[1].numpy()))
    if any(found.shape != wanted.shape for found, wanted in pairs):
        return count, count
    return count, sum(int(np.count_nonzero(found != wanted)) for found, wanted in pairs)
