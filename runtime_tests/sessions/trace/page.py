"""A trace as tables on the terminal, and a page with a plot."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from export.host.console import say
from export.toolbox import charts
from export.toolbox.charts import Series
from export.toolbox.tables import NONE, plain
from runtime_tests.checks.accuracy import BEST_SQNR_DB
from runtime_tests.reports.templates import render

from .comparison import Part
from .run import Trace

_TEMPLATE = Path(__file__).parent / "page.html.j2"
_HIGHEST = 100.0
"""dB in the plot: above it two parts differ by the order of their sums only."""
_ALONE = (
    "SQNR of each part alone, dB, from the values that the artifact itself gave it; so far: everything before it too"
)


def show(trace: Trace) -> None:
    """Print a table for each way of feeding, how the values were read, and the verdict."""
    for way, parts in trace.parts.items():
        say(f"{way}: {_ALONE}", *plain(rows(trace, parts)), "")
    say(*notes(trace), verdict(trace))


def write(trace: Trace, folder: Path) -> Path:
    """index.html and trace.json; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace.json").write_text(trace.model_dump_json(indent=1) + "\n", encoding="utf-8")
    sections = [(way, _plot(parts), _legend(parts), rows(trace, parts)) for way, parts in trace.parts.items()]
    page = folder / "index.html"
    holds = trace.first is None
    values = {"trace": trace, "verdict": verdict(trace), "notes": notes(trace), "holds": holds, "sections": sections}
    page.write_text(render(_TEMPLATE, alone=_ALONE, series=charts.SERIES, **values), encoding="utf-8")
    return page


def rows(trace: Trace, parts: Sequence[Part]) -> list[list[str]]:
    """A line for each layer, one for the embedding and one for the head; `!` where a part breaks."""
    kinds = _kinds(parts)
    table = [["layer", *kinds, "so far"]]
    for own in _layers(parts):
        cells = {part.name: _db(part.alone) + " !" * trace.breaks(part) for part in own}
        label = own[0].name if own[0].layer is None else str(own[0].layer)
        table.append([label, *(cells.get(kind, NONE) for kind in kinds), _db(own[-1].so_far)])
    return table


def notes(trace: Trace) -> list[str]:
    """How it was read, whether the probe computes what the session does, and the rule."""
    same = trace.plain_sqnr_db >= BEST_SQNR_DB
    plain_logits = "the same" if same else f"others: {trace.plain_sqnr_db:.1f} dB"
    limits = ", ".join(f"{kind} {limit:g}" for kind, limit in trace.limits.items())
    return [
        f"values: {trace.note}",
        f"logits without reading them: {plain_logits}",
        f"a part breaks where its median token is under a limit that its runtime's rounding stays above: {limits} dB",
    ]


def verdict(trace: Trace) -> str:
    """The first part that breaks, or that none does."""
    if trace.first is None:
        return f"{trace.artifact}: no part breaks"
    way, part = trace.first
    place = part.name if part.layer is None else f"layer {part.layer}, {part.name}"
    return f"{trace.artifact}: first to break: {place}: {_db(part.alone)} dB, limit {trace.limit(part):g} ({way})"


def _kinds(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(part.name for part in parts))


def _layers(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts of one layer at a time; embedding and head are one each."""
    for key in dict.fromkeys(part.name if part.layer is None else part.layer for part in parts):
        yield [part for part in parts if key == (part.name if part.layer is None else part.layer)]


def _db(value: float) -> str:
    if value <= -BEST_SQNR_DB:
        return "not finite"
    return "exact" if value >= BEST_SQNR_DB else f"{value:.1f}"


def _curves(parts: Sequence[Part]) -> list[Series]:
    """Each kind of part over the layers, and the residual stream; a kind of one value has no curve."""
    alone = {kind: [part.alone for part in parts if part.name == kind] for kind in _kinds(parts)}
    curves = {kind: values for kind, values in alone.items() if len(values) > 1}
    curves["so far"] = [own[-1].so_far for own in _layers(parts) if own[0].layer is not None]
    return [
        Series(kind, [max(min(value, _HIGHEST), -20.0) for value in values], i)
        for i, (kind, values) in enumerate(curves.items())
    ]


def _plot(parts: Sequence[Part]) -> str:
    return charts.lines(_curves(parts), label="SQNR of each part of each layer, dB", x_label="layer", log=False)


def _legend(parts: Sequence[Part]) -> list[tuple[str, int]]:
    return [(curve.label, curve.colour) for curve in _curves(parts)]
