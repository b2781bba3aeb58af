"""A target: a format, the runtime that runs it, and what it may lose there."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from export.architecture import Positive, Strict

from .identifiers import Name

Attention = Literal["fused", "plain"]
"""One operation of the runtime, or its parts: matmul, softmax, matmul."""
Cache = Literal["float32", "float16", "bfloat16", "int8"]
"""Numbers of a KV cache."""


def _policy(text: str) -> str:
    if re.fullmatch(r"(window|sink)-[1-9][0-9]{0,6}", text):
        return text
    raise ValueError(f"{text!r} is none; give window-N or sink-N, N tokens")


Policy = Annotated[str, AfterValidator(_policy)]
"""Which tokens stay in the KV cache. `window-N`: a token attends to the last N, itself among them, at their positions.
`sink-N`: all, and when the context is full, the older half of those behind the first N leaves; the rest moves up."""


class TargetLimits(Strict):
    """The most a lowering may differ: our quantized model against the artifact.

    Where the runtime quantizes activations, these are differences beyond what float noise alone does to the same
    model (see docs/decisions.md, "Rounding is chaotic").
    """

    max_mean_kl: float
    """Mean KL divergence, nats."""
    min_top1: float
    """Share of positions with the same likeliest token."""
    min_sqnr_db: float
    """Signal to noise of the logits, dB."""
    min_probe_sqnr_db: float | None
    """SQNR the best of many single-token prompts must reach: there rounding noise has not grown yet. null: not run."""
    compared_tokens: Positive | None
    """Greedy tokens of an attached device that are compared with this machine's. null: not compared, because the
    runtime's kernels for another processor round differently by design."""


class CacheLimits(Strict):
    """What a kind of cache may cost beyond the lowering, near each of several places up to the end of the context.

    Compared are our quantized model, whose cache is float32, and the artifact.
    """

    max_mean_kl: float
    """Mean KL divergence that may come on top of the lowering's, nats."""
    min_top1: float
    """Share that must be left of the positions where the lowering keeps the likeliest token."""
    min_probe_sqnr_db: float | None
    """Instead of the target's; null: no single tokens are compared."""


class Target(Strict):
    """A format and the runtime that runs it."""

    name: Name
    description: str
    """For people; decides nothing."""
    backend: Name
    """Package in export/formats/ that writes the artifact."""
    session: Name
    """Module in runtime_tests/sessions/ that runs it."""
    artifact: Name
    """File or folder the artifact is, inside the artifact folder."""
    activations: Literal["none", "int8-per-token"]
    """Activation quantization the runtime adds; the eager reference does the same."""
    logits: Literal["last", "all"]
    """Positions of a prompt for which the artifact returns logits."""
    attention: Annotated[Attention, Field(exclude_if=lambda attention: attention == "fused")] = "fused"
    """Of Core ML: `plain` is matmul, softmax and matmul, for systems where the fused operation is wrong or slow."""
    cache: Annotated[Cache | None, Field(exclude_if=lambda cache: cache is None)] = None
    """Numbers of the KV cache where `--cache` asks for no others; null: the first kind of the format."""
    cache_limits: Annotated[Mapping[Cache, CacheLimits], Field(exclude_if=lambda limits: not limits)] = {}
    """For kinds of cache that lose more than the format's first one."""
    limits: TargetLimits
    """What validation judges the lowering by."""
    limits_on: dict[str, TargetLimits]
    """Limits for processors whose kernels round differently, by family: aarch64, x86_64."""
