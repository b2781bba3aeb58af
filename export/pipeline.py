"""The whole flow: checkpoint → quantized once → lowered → described. Reading `export` is reading the project."""

from pathlib import Path

from . import (
    artifact,
    backends,
    card,
    checkpoint,
    first_calls,
    manifest,
    memory,
    preflight,
    quantize,
    schemes,
    tokenizer,
)
from .backends import Build
from .manifest import Manifest
from .plan import Architecture, Plan
from .progress import stage
from .quantize import QuantizedModel

CACHE = manifest.ROOT / "build" / "cache"


def export(plan: Plan, source: str | None, out: Path) -> Manifest:
    """Build one artifact folder. Each line is one stage; each value is what the next one needs."""
    backend = backends.load(plan.target.backend)
    architecture = plan.quant.reshaped(checkpoint.architecture_of(plan.model, source))
    check(plan, architecture, backend)
    preflight.require(preflight.estimate(plan, source, architecture, CACHE), out, CACHE)
    first_calls.settle()
    with artifact.building(out, plan.id) as folder:
        with stage("checkpoint"):
            weights = checkpoint.load(plan.model, source)
            build = Build(plan, tokenizer.write(weights.source, folder, architecture.vocab_size), folder)
            memory.give_back()
        with stage("quantize", plan.quant.description):
            model = quantize.quantize(weights, plan.quant, CACHE)
            memory.give_back()
        with stage("lower", plan.target.description):
            lowered = backend.lower(model, build)
        with stage("describe"):
            described = describe(model, build, lowered)
            manifest.write(folder, described)
            card.write(folder, described, [])
    return described


def check(plan: Plan, architecture: Architecture, backend: backends.Backend) -> None:
    """Recipe and target fit these shapes; asked before a weight is read or hashed."""
    schemes.check(plan.quant, architecture)
    backend.check(plan, architecture)


def describe(model: QuantizedModel, build: Build, lowered: backends.Lowered) -> Manifest:
    """The manifest of what was just written."""
    checkpoint_info = manifest.CheckpointInfo(
        origin=model.checkpoint.origin,
        description=model.checkpoint.source.description,
        bits_per_weight=model.checkpoint.bits_per_weight,
        sha256=model.checkpoint.sha256,
    )
    return Manifest(
        schema_version=1,
        id=build.plan.id,
        plan=build.plan,
        architecture=model.architecture,
        checkpoint=checkpoint_info,
        quantization=manifest.QuantizationInfo(
            key=model.key,
            bits_per_weight=round(model.bits_per_weight, 4),
            layers=model.layers,
            calibration=model.calibration,
        ),
        contract=lowered.contract,
        tokenizer=build.tokenizer,
        lowering=lowered.facts,
        tools=manifest.tool_versions(),
        source=manifest.source_info(),
        files=manifest.hash_files(build.folder),
    )
