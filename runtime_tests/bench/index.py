"""docs/benchmarks.md: a section per measured model, with its ratios and the way to its page. Measures nothing."""

from collections.abc import Mapping

from . import tables
from .results import Benchmark
from .table_text import markdown


def render(runs: Mapping[str, Benchmark]) -> str:
    """The whole page; keys are the models' pages without `.md`, relative to it."""
    parts = [
        "# Benchmarks",
        "Ours against stock runtimes: the same weights, one interleaved run per model. Above 1 means more: tokens per "
        "second, seconds of loading, bytes. How it was measured, figures, accuracy, memory and conditions are on the "
        "pages of the models.",
        "Written by `python -m runtime_tests.bench … --write`; do not edit.",
    ]
    for page, run in runs.items():
        parts += section(page, run)
    return "\n\n".join(parts) + "\n"


def section(page: str, run: Benchmark) -> list[str]:
    """One model."""
    return [
        f"## {run.model}, {run.quant}",
        f"[Everything measured]({page}.md) · weights: {run.checkpoint} · {run.environment.cpu}, "
        f"{run.settings.threads} threads · {run.settings.repetitions} repetitions · {run.started_at[:10]}, commit "
        f"`{run.commit[:12]}`",
        markdown(tables.compared(run)),
        *(f"![decoded tokens per second]({page}-decode.svg)" for _ in run.entries[:1]),
    ]
