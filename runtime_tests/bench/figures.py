"""Figures of a benchmark: rates as bars with their spread, accuracy over size. Files of their own, light and dark."""

from collections.abc import Callable
from typing import NamedTuple

from . import scatter, tables
from .results import Benchmark, Entry
from .svg import MUTED, OURS, STOCK, STRONG, document, rect, rule
from .svg import text as words
from .timing import Timing

LABELS = 300
"""Width of the names' column."""
RIGHT = 640
ROW = 40
HEAD = 34


class Figure(NamedTuple):
    """A file's text and what it shows."""

    svg: str
    label: str


def draw(run: Benchmark) -> dict[str, Figure]:
    """Kind → figure; what was not measured is not drawn."""
    longest, near = max(run.settings.prompts), run.settings.near_position
    found = {
        "decode": bars(run, lambda timing: timing.decode_tps, f"decoded tokens per second around position {near}"),
        "prefill": bars(run, tables.prefill(longest), f"prefill of {longest} tokens, tokens per second"),
    }
    if run.settings.far_prompt:
        label = f"decoded tokens per second around position {run.settings.far_position}"
        found["decode-far"] = bars(run, lambda timing: timing.far_decode_tps, label)
    points = accuracy_points(run)
    if points:
        label = "mean KL to the fp32 model over size"
        found["accuracy"] = Figure(scatter.draw(points, label, "MB", "mean KL, nats"), label)
    return found


def bars(run: Benchmark, metric: Callable[[Timing], float], label: str) -> Figure:
    """A bar per contender that ran: the median, with a line from p10 to p90."""
    shown = [(entry, found) for entry in run.entries if (found := run.spread(entry.name, metric))]
    scale = (RIGHT - LABELS) / max([1e-9, *(found.p90 for _, found in shown)])
    parts = [words(16, 22, label, STRONG)]
    for i, (entry, found) in enumerate(shown):
        y = HEAD + i * ROW
        parts += [
            words(LABELS - 12, y + 17, entry.label, STRONG if entry.ours else "", "end"),
            words(LABELS - 12, y + 32, entry.runtime, MUTED, "end"),
            rect(LABELS, y + 10, max(found.median * scale, 1), 20, OURS if entry.ours else STOCK),
            rule(LABELS + found.p10 * scale, LABELS + found.p90 * scale, y + 20),
            words(RIGHT + 10, y + 25, f"{found.median:.0f} ({found.p10:.0f}–{found.p90:.0f})"),
        ]
    return Figure(document(HEAD + len(shown) * ROW + 8, label, parts), label)


def accuracy_points(run: Benchmark) -> list[scatter.Point]:
    """Size and KL of every artifact whose logits were compared."""
    by_name: dict[str, Entry] = {entry.name: entry for entry in run.entries}
    return [
        scatter.Point(
            by_name[found.contender].size_bytes / 1e6,
            found.mean_kl,
            f"{by_name[found.contender].label} · {by_name[found.contender].runtime}",
            by_name[found.contender].ours,
        )
        for found in run.fidelity
        if found.positions and found.mean_kl > 0
    ]
