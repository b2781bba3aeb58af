"""Which runs may be compared with each other over time. Knows nothing about what they measured."""

import hashlib
import json
from typing import Any

from export.manifest import Manifest

from .evaluation import Evaluation, read_text
from .record import PlanKey

WORDS = {"description", "limits", "limits_on"}
"""Fields of a YAML that change neither an artifact nor a number."""


def of(described: Manifest, evaluation: Evaluation) -> PlanKey:
    """The key of one artifact under one evaluation.

    Code and tool versions are left out: what they do to an artifact is what a comparison over time is for.
    """
    plan = described.plan
    model = plan.model.model_dump(mode="json", exclude={"context_length"})
    texts = [read_text(text.file) for text in evaluation.texts]
    return PlanKey(
        model=short_hash([model, described.checkpoint.sha256]),
        recipe=short_hash(plan.quant.model_dump(mode="json", exclude=WORDS)),
        target=short_hash(plan.target.model_dump(mode="json", exclude=WORDS)),
        context=str(described.contract.kv.context_length),
        evaluation=short_hash([evaluation.model_dump(mode="json", exclude=WORDS), texts]),
    )


def short_hash(value: Any) -> str:
    """Eight digits of the sha256 of plain values as JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
