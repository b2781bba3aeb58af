"""The plots of a report. Bars and dots are HTML, so that names wrap and nothing is cut; curves and maps are SVG."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from export.manifest import Candidate, LayerInfo, Manifest
from export.toolbox import charts
from export.toolbox.charts import Series
from runtime_tests.evidence.record import Comparison, Record, Slice

_SHIPPED = "As shipped: Transformers fp32 → artifact, mean nats."
_NAMES = 296
"""Left edge of the names beside the plot of layers."""
_MOST_NAMED, _ROW = 9, 17
"""Layers that are named in it, and the height of a name."""
_MOST_TICKS = 4


class Dot(NamedTuple):
    """A mark on a track; `at` is percent of its length."""

    at: float
    title: str
    colour: int


class Row(NamedTuple):
    """A named track: with a bar of `share` percent and its value as text, or with dots only."""

    label: str
    text: str
    share: float
    dots: Sequence[Dot]
    colour: int


class Figure(NamedTuple):
    """One plot: an SVG, or rows with the ticks below them; empty plots have neither."""

    title: str
    note: str
    legend: Sequence[tuple[str, int]] = ()
    svg: str = ""
    bars: Sequence[Row] = ()
    dots: Sequence[Row] = ()
    ticks: Sequence[tuple[float, str]] = ()

    @property
    def wide(self) -> bool:
        """Curves and dots of several artifacts stand below what has one number for each."""
        return bool(self.legend)


def figures(records: Sequence[Record], manifests: Sequence[Manifest], names: Sequence[str]) -> list[Figure]:
    """Every plot that is not empty; `names` are those of the records on this page."""
    legend = [(name, i) for i, name in enumerate(names)]
    quantized = list({m.quantization.key: m for m in reversed(manifests) if _linears(m)}.values())
    layers = [(_name_of(m), i) for i, m in enumerate(quantized)]
    drawn = [
        Figure("Size", "Bytes of the artifact that ships, without tokenizer files.", bars=_sizes(records, names)),
        Figure("Decode", "Tokens per second; dots are repeats.", bars=decode(records, names)),
        Figure(
            "Prefill", "Prompt tokens per second; dots are repeats.", bars=_speeds(records, names, generation=False)
        ),
        Figure(
            "KL per decode step", "Quantized model → artifact, nats, filling cache.", legend, _steps(records, names)
        ),
        _slices("KL per text", records, legend, lambda comparison: comparison.by_domain),
        _slices("KL per position", records, legend, lambda comparison: comparison.by_position),
        Figure(
            "Weight SQNR per layer",
            "Linears in execution order, dB. Named: the worst, by layer, linear and dB.",
            layers,
            layer_plot(quantized),
        ),
    ]
    for described in quantized:  # those that promoted linears: which, and the loss at every other size
        name = _name_of(described)
        note = "Framed: promoted. Stronger: rounding it alone costs more KL."
        drawn.append(Figure(f"Bits per linear: {name}", note, svg=choice_map(described)))
        note = (
            f"Expected held-out KL, most saved per byte first, scaled to what was measured (dot: {choice(described)})."
        )
        drawn.append(Figure(f"Size and loss: {name}", note, svg=front(described)))
    return [figure for figure in drawn if figure.svg or figure.bars or figure.dots]


def _name_of(described: Manifest) -> str:
    return f"{described.plan.name} {described.plan.quant.name}"


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rate(mean: float, deviation: float) -> str:
    """`12.3 ± 0.4`, whole numbers from 100 on."""
    return f"{mean:.1f} ± {deviation:.1f}" if mean < 100 else f"{mean:,.0f} ± {deviation:,.0f}"


def _sizes(records: Sequence[Record], names: Sequence[str]) -> list[Row]:
    sizes = [record.size_bytes / 1e6 for record in records]
    return _bars(
        [(name, size, f"{size:,.1f} MB", (), i) for i, (name, size) in enumerate(zip(names, sizes, strict=True))]
    )


def decode(records: Sequence[Record], names: Sequence[str]) -> list[Row]:
    """Tokens per second with every repeat; empty when nothing was timed."""
    return _speeds(records, names, generation=True)


def _speeds(records: Sequence[Record], names: Sequence[str], *, generation: bool) -> list[Row]:
    return _bars(
        [
            (
                names[i] + ("" if generation else f" · {test.n_prompt} tokens"),
                test.avg_ts,
                _rate(test.avg_ts, test.stddev_ts),
                test.samples_ts,
                i,
            )
            for i, record in enumerate(records)
            for test in (record.timings.tests if record.timings else ())
            if bool(test.n_gen) == generation
        ]
    )


def _bars(rows: Sequence[tuple[str, float, str, Sequence[float], int]]) -> list[Row]:
    """Bars from zero, all on one scale: label, value, its text, repeats, colour."""
    largest = max([1e-12, *(max(value, *samples, 0.0) for _, value, _, samples, _ in rows)])
    return [
        Row(
            label,
            text,
            _percent(value / largest),
            [Dot(_percent(one / largest), f"{one:.4g}", i) for one in samples],
            i,
        )
        for label, value, text, samples, i in rows
    ]


def _percent(share: float) -> float:
    return round(100 * max(share, 0.0), 2)


def _slices(
    title: str,
    records: Sequence[Record],
    legend: Sequence[tuple[str, int]],
    slices: Callable[[Comparison], dict[str, Slice]],
) -> Figure:
    """Mean KL as shipped of every slice of one kind, one dot for each artifact; empty when none was measured."""
    losses = {i: slices(record.accuracy.total) for i, record in enumerate(records) if record.accuracy.total}
    values = [part.mean_kl for parts in losses.values() for part in parts.values() if part.mean_kl > 0]
    if not values:
        return Figure(title, _SHIPPED)
    x = charts.logarithmic(values, 0, 100)
    labels = list(dict.fromkeys(label for parts in losses.values() for label in parts))
    rows = []
    for label in labels:
        measured = {i: parts[label].mean_kl for i, parts in losses.items() if label in parts}
        dots = [Dot(round(x(kl), 2), f"{label}, {legend[i][0]}: {kl:.2e}", i) for i, kl in measured.items()]
        rows.append(Row(label, "", 0, dots, 0))
    shown = x.ticks[:: math.ceil(len(x.ticks) / _MOST_TICKS)]
    return Figure(
        title, _SHIPPED, legend, dots=rows, ticks=[(round(x(tick), 2), charts.tick_text(tick)) for tick in shown]
    )


# ── curves ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _steps(records: Sequence[Record], names: Sequence[str]) -> str:
    series = [
        Series(names[i], record.accuracy.lowering.kl_by_step, i)
        for i, record in enumerate(records)
        if record.accuracy.lowering
    ]
    label, x_label = "KL divergence per decode step", "decode step (0: after the prefill)"
    return charts.lines(series, label=label, x_label=x_label, log=True) if series else ""


def _linears(described: Manifest) -> list[LayerInfo]:
    """Those inside the layers; embedding and head have more bits and would flatten the plot."""
    inside = described.architecture.linear_shapes()
    return [layer for layer in described.quantization.layers if layer.name in inside]


def layer_plot(quantized: Sequence[Manifest]) -> str:
    """SQNR of every linear of each quantization: all of them named on hover, the worst beside the plot as well."""
    points = [[(_place(layer.name), layer) for layer in _linears(described)] for described in quantized]
    if not points:
        return ""
    x = charts.whole(max(at for line in points for at, _ in line), charts.LEFT, _NAMES - 20)
    y = charts.linear([layer.sqnr_db for line in points for _, layer in line], charts.BOTTOM, charts.TOP)
    drawn = charts.axes(x, y, "layer")
    for i, line in enumerate(points):
        drawn.append(charts.polyline([(x(at), y(layer.sqnr_db)) for at, layer in line], i, _name_of(quantized[i])))
    for line in points:
        drawn += [charts.hover(x(at), y(layer.sqnr_db), f"{layer.name}: {layer.sqnr_db:.1f} dB") for at, layer in line]
    worst = sorted(_worst(points), key=lambda one: y(one[2].sqnr_db))
    wanted = [min(y(layer.sqnr_db), charts.BOTTOM - _ROW * after) for after, (_, _, layer) in enumerate(worst[::-1])]
    for (i, at, layer), row in zip(worst, charts.apart(wanted[::-1]), strict=True):
        title = f"{layer.name}: {layer.sqnr_db:.1f} dB"
        number, kind = layer.name.removeprefix("model.layers.").removesuffix(".weight").split(".")[::2]
        drawn += [
            charts.line(x(at), y(layer.sqnr_db), _NAMES - 6, row),
            charts.circle(x(at), y(layer.sqnr_db), "3.5", title=title, fill=charts.colour(i)),
            charts.text(_NAMES, row + 4, f"{number} {kind} {layer.sqnr_db:.1f}", charts.MUTED),
        ]
    return charts.inline(charts.HEIGHT, "weight SQNR per layer", drawn)


def _place(name: str) -> float:
    """A linear's layer, and how far it comes in it."""
    place = charts.place_of(name)
    assert place is not None  # names of `linear_shapes`
    return place[0] + place[1] / charts.KINDS


def _worst(points: Sequence[Sequence[tuple[float, LayerInfo]]]) -> list[tuple[int, float, LayerInfo]]:
    """The lowest of each line, as many as have room: line, place, layer."""
    each = max(1, min(3, _MOST_NAMED // len(points)))
    lowest = [sorted(line, key=lambda point: point[1].sqnr_db)[:each] for line in points]
    named = [(i, at, layer) for i, line in enumerate(lowest) for at, layer in line]
    return sorted(named, key=lambda one: one[2].sqnr_db)[:_MOST_NAMED]


# ── promotion ───────────────────────────────────────────────────────────────────────────────────────────────────────
def choice_map(described: Manifest) -> str:
    """A cell for every linear, layers from left to right: framed where promoted, stronger where rounding costs more."""
    candidates = _candidates_of(described)
    if not candidates:
        return ""
    costs = [math.log10(max(candidate.kl, 1e-12)) for candidate in candidates]
    low, high = min(costs), max(costs)
    cells = {
        c.name: charts.Cell(_title_of(c), 0, 0.15 + 0.85 * (cost - low) / ((high - low) or 1), c.promoted)
        for c, cost in zip(candidates, costs, strict=True)
    }
    drawn = charts.linear_map(cells, 0, charts.TOP, charts.WIDTH)
    return charts.inline(charts.TOP + charts.MAP_HEIGHT + 6, "bits of every linear", drawn)


def _title_of(candidate: Candidate) -> str:
    bits = "int8" if candidate.promoted else "as the recipe says"
    losses = f"alone costs KL {candidate.kl:.2e}, promoted {candidate.promoted_kl:.2e}"
    return f"{candidate.name}: {bits}; {losses}, {candidate.extra_bytes / 1e3:,.0f} kB more"


def front(described: Manifest) -> str:
    """Expected KL at every size, with the best linears promoted first, and the size that was chosen."""
    candidates = _candidates_of(described)
    info = described.quantization.calibration
    if not candidates or info is None or info.held_out_kl is None:
        return ""
    expected = sum(c.promoted_kl if c.promoted else c.kl for c in candidates)
    points = pareto(candidates, smallest_mb(described), info.held_out_kl / expected)
    x = charts.linear([mb for mb, _ in points], charts.LEFT, charts.RIGHT)
    y = charts.logarithmic([kl for _, kl in points], charts.BOTTOM, charts.TOP)
    parts = [
        *charts.axes(x, y, "MB of all weights"),
        charts.polyline([(x(mb), y(kl)) for mb, kl in points], 0, "expected KL"),
        charts.circle(x(_chosen_mb(described)), y(info.held_out_kl), title=choice(described), fill=charts.colour(3)),
    ]
    return charts.inline(charts.HEIGHT, "size and expected KL", parts)


def choice(described: Manifest) -> str:
    """What was chosen: `89.3 MB, KL 0.0104, 8 of 14 linears promoted`; empty where the recipe promotes nothing."""
    candidates, info = _candidates_of(described), described.quantization.calibration
    if not candidates or info is None or info.held_out_kl is None:
        return ""
    promoted = sum(c.promoted for c in candidates)
    kl = f"KL {info.held_out_kl:.4f}"
    return f"{_chosen_mb(described):.1f} MB, {kl}, {promoted} of {len(candidates)} linears promoted"


def _chosen_mb(described: Manifest) -> float:
    return smallest_mb(described) + sum(c.extra_bytes for c in _candidates_of(described) if c.promoted) / 1e6


def pareto(candidates: Sequence[Candidate], smallest: float, scale: float) -> list[tuple[float, float]]:
    """(MB, KL) with the first 0, 1, 2 … candidates promoted; `scale` is the measured KL over the expected one."""
    size, kl = smallest, sum(c.kl for c in candidates)
    points = [(size, kl * scale)]
    for c in candidates:
        size, kl = size + c.extra_bytes / 1e6, kl + c.promoted_kl - c.kl
        points.append((size, max(kl, 1e-12) * scale))
    return points


def smallest_mb(described: Manifest) -> float:
    """MB of all weights without any promotion."""
    parameters = described.architecture.parameters
    extra = sum(c.extra_bytes for c in _candidates_of(described) if c.promoted)
    return (parameters * described.quantization.bits_per_weight / 8 - extra) / 1e6


def _candidates_of(described: Manifest) -> tuple[Candidate, ...]:
    """Best first; empty where the recipe promotes nothing."""
    info = described.quantization.calibration
    return info.candidates if info else ()
