"""The whole flow: checkpoint → quantized once → lowered → described. Start reading here, at `export`."""

from pathlib import Path

from . import card, checkpoints, formats, manifest, quantization
from .architecture import Architecture
from .build import folder as artifact
from .build import needs
from .checkpoints import tokenizer, whereabouts
from .checkpoints.origin import Adapter, Origin, origin_of, published, published_base, published_plan
from .formats import Build, storage
from .host import disk, memory, mkl
from .host.console import console, note, stage
from .manifest import Manifest, TokenizerIds
from .plan import Plan, shortened
from .quantization import processors, schemes
from .quantization.store import QuantizedModel

CACHE = manifest.ROOT / "build" / "cache"


def export(plan: Plan, source: Origin | None, out: Path) -> Manifest:
    """Build one artifact folder. Each line is a step; each value is what later steps need."""
    backend = formats.load(plan.target.backend)
    architecture = plan.quant.reshaped(checkpoints.architecture_of(plan.model, source))
    plan = fitted(plan, architecture)
    check(plan, architecture, backend)
    processors.require(plan.device)
    cache = disk.cache_folder(CACHE)
    needs.require(needs.estimate(plan, source, architecture, cache), out, cache)
    mkl.settle()
    with artifact.building(out, plan.id, origin_of(plan.model, source)) as folder:
        with stage("checkpoint"):
            weights = checkpoints.load(plan.model, source)
            for line in weights.notes:
                note(line)
            build = Build(plan, _tokenizer(weights, backend, folder), folder)
            memory.give_back()
        with stage("quantize", plan.quant.name):
            model = quantization.quantize(weights, plan.quant, cache, plan.device)
            memory.give_back()
        with stage("lower", plan.target.description):
            lowered = backend.lower(model, build)
        with stage("describe"):
            described = describe(model, build, lowered)
            whereabouts.remember(weights.origin, weights.sha256)
            manifest.write(folder, described)
            if line := manifest.git_is_silent(described.source):
                note(line)
            card.write(folder, described, [])
        console.print(f"  weights: {storage.line(described)}", soft_wrap=True)
        console.print(f"  KV cache: {storage.cache(described.contract.kv)}", soft_wrap=True)
        console.print(f"  memory to run it: {storage.process(described)}", soft_wrap=True)
    return described


def fitted(plan: Plan, architecture: Architecture) -> Plan:
    """The plan with a context that the checkpoint has positions for, and a line that says so."""
    short = shortened(plan, architecture.max_position_embeddings)
    if short != plan:
        longest, was = short.model.context_length, plan.model.context_length
        note(f"context of {longest} tokens instead of {was}: the checkpoint's max_position_embeddings")
    return short


def _tokenizer(weights: checkpoints.Checkpoint, backend: formats.Format, folder: Path) -> TokenizerIds:
    """Written, compared with the format's stock client, and what is remarkable about it said."""
    ids = tokenizer.write(weights.source, folder, weights.architecture.vocab_size)
    ids = ids.model_copy(update={"notes": (*ids.notes, *backend.tokenizer_notes(folder))})
    for line in ids.notes:
        note(line)
    return ids


def check(plan: Plan, architecture: Architecture, backend: formats.Format) -> None:
    """Refuse a recipe or target that does not fit these shapes, before a weight is read or hashed."""
    formats.check_cache(plan)
    formats.check_policy(plan)
    schemes.check(plan.quant, architecture)
    backend.check(plan, architecture)


def describe(model: QuantizedModel, build: Build, lowered: formats.Lowered) -> Manifest:
    """The manifest of what was just written."""
    origin = model.checkpoint.origin
    checkpoint_info = manifest.CheckpointInfo(
        origin=published(origin),
        description=model.checkpoint.source.description,
        bits_per_weight=model.checkpoint.bits_per_weight,
        sha256=model.checkpoint.sha256,
        trained_on=published_base(origin.adapter.path) if isinstance(origin, Adapter) else None,
    )
    return Manifest(
        schema_version=1,
        id=build.plan.id,
        plan=published_plan(build.plan),
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
        tools=formats.tool_versions(),
        source=manifest.source_info(),
        cache_scales=lowered.cache_scales,
        files=manifest.hash_files(build.folder),
    )
