"""Keys of proofs: an artifact that the same code proved on the same machine need not be proven again."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from devices import Device
from export import formats, manifest
from export.formats import admission
from export.host import digests
from export.host.console import console
from export.manifest import ROOT, Manifest, flat
from export.plan import Plan
from runtime_tests.checks import limits
from runtime_tests.checks.limits import Limits
from runtime_tests.evaluation import Evaluation, read_text, text_file
from runtime_tests.places import environment

from . import baseline, record
from .record import Environment, Made, PlanKey

CODE = (ROOT / "runtime_tests", ROOT / "devices")
_WORDS = {"description", "limits", "limits_on", "cache_limits"}
"""Fields of a YAML that change neither an artifact nor a number."""


def key(folder: Path, device: Device, evaluation: Evaluation, machine: Environment, judged_by: Limits) -> str:
    """sha256 over everything that decides a verdict, except the machine's load."""
    path = baseline.place(device.name, machine)
    inputs = {
        "manifest": manifest.digest(folder),
        "device": device.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "limits": judged_by.model_dump(mode="json"),
        "texts": [digests.sha256(text_file(text.file)) for text in evaluation.texts],
        "baseline": digests.sha256(path) if path.is_file() else None,
        "machine": [machine.cpu, machine.cores, machine.memory_bytes, machine.os, machine.python, machine.tools],
        "code": [digests.artifact_digest(), digests.code_digest(*CODE)],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def without(
    cases: Sequence[tuple[Path, Manifest]],
    device: Device,
    evaluation: Evaluation,
    records: Path,
    given: Limits | None = None,
) -> list[tuple[Path, Manifest]]:
    """The artifacts that must be proven; for each of the others its last verdict is printed.

    `given`: limits that judge them instead of this checkout's.
    """
    machine, unproven = environment.current(device.compute_units), []
    for folder, described in cases:
        newest = record.newest_of(records, manifest_sha256=manifest.digest(folder))
        proven = key(folder, device, evaluation, machine, limits.of(described, given))
        if newest is None or not newest.holds or newest.proof != proven:
            unproven.append((folder, described))
            continue
        admission.require(folder, described)
        console.print(f"{folder}: {newest.outcome.value} on {newest.started_at}, nothing changed since", soft_wrap=True)
    return unproven


def plan_key(described: Manifest, evaluation: Evaluation) -> PlanKey:
    """The key of one artifact under one evaluation.

    It leaves out code and tool versions: a comparison over time is to show what those do to an artifact.
    """
    plan = described.plan
    model = plan.model.model_dump(mode="json", exclude={"context_length"})
    texts = [read_text(text.file) for text in evaluation.texts]
    return PlanKey(
        model=_short_hash([model, described.checkpoint.sha256]),
        recipe=_short_hash(plan.quant.model_dump(mode="json", exclude=_WORDS)),
        target=_short_hash(_target(plan)),
        context=str(described.contract.kv.context_length),
        evaluation=_short_hash([evaluation.model_dump(mode="json", exclude=_WORDS), texts]),
    )


def _target(plan: Plan) -> dict[str, Any]:
    """What a target's YAML decides, with the kind of cache where it is not the format's first, and a policy."""
    fields = plan.target.model_dump(mode="json", exclude=_WORDS | {"cache"})
    fields |= {"policy": plan.policy} if plan.policy else {}
    if plan.target.backend not in formats.names():  # refused where artifacts are admitted
        return fields
    kind = formats.cache_of(plan)
    return fields if kind == formats.load(plan.target.backend).CACHES[0] else fields | {"cache": kind}


def made(described: Manifest) -> Made:
    """What an artifact is made of. A fine-tune, whatever its vocabulary, is of the family of the model it began as."""
    plan, shapes = described.plan, described.architecture
    checkpoint = described.checkpoint
    return Made(
        name=plan.name,
        family=f"{plan.model.name} ({shapes.num_hidden_layers} layers of {shapes.hidden_size})",
        target=plan.target.name,
        context=described.contract.kv.context_length,
        recipe={name: str(value) for name, value in flat(plan.quant.model_dump(mode="json", exclude=_WORDS)).items()},
        checkpoint=f"{checkpoint.origin} {_short_hash(checkpoint.sha256)}",
        tools=described.tools,
        code=described.source.revision,
    )


def _short_hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
