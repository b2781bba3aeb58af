"""One self-contained HTML page per run: verdict, numbers, plots, gates, environment. Loads nothing from anywhere."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from export.build import request
from export.manifest import UNKNOWN, Candidate, Manifest
from export.toolbox import charts
from export.toolbox.charts import Bar, Series
from export.toolbox.tables import NONE
from runtime_tests.checks import loss
from runtime_tests.evidence.record import Comparison, DeviceState, Outcome, Record, Slice

from . import summary, templates

_TEMPLATE = Path(__file__).parent / "report.html.j2"
_SHIPPED = "As shipped: Transformers fp32 → artifact, mean nats."


def render(records: Sequence[Record], manifests: Sequence[Manifest]) -> str:
    """The page; `manifests` are those of the records, in the same order."""
    first = records[0]
    rates = (r.latency.read_bandwidth_bytes_per_s for r in records if r.latency)
    return templates.render(
        _TEMPLATE,
        records=records,
        manifests=manifests,
        verdict=_verdict(records),
        rows=[_table_row(record) for record in records],
        losses=list(zip(records, loss.tables(records), strict=True)),
        loss_columns=loss.COLUMNS,
        charts=_charts(records, manifests),
        chart_style=charts.STYLE,
        series=charts.SERIES,
        commands=_commands(records, manifests),
        run=first,
        state=_state_rows(first),
        memory_gb=f"{first.environment.memory_bytes / 1e9:.0f}",
        bandwidth=next((rate / 1e9 for rate in rates if rate), None),
        tools={name: version for name, version in first.environment.tools.items() if version != "not installed"},
    )


def _commands(records: Sequence[Record], manifests: Sequence[Manifest]) -> list[str]:
    """Lines of a shell that build what the page shows, and validate it as it was, each at its commit."""
    run, built = records[0], [f"build/{m.id}" for m in manifests]
    options = ["--device", run.device, "--eval", run.accuracy.evaluation]
    lines = [(m.source.commit, m.source.dirty, request.command(m)) for m in manifests]
    lines.append((run.commit, run.dirty, request.shell(["-m", "runtime_tests", *options, *built])))
    shown: list[str] = []
    for i, (commit, dirty, line) in enumerate(lines):
        if commit != UNKNOWN and (i == 0 or lines[i - 1][:2] != (commit, dirty)):
            shown.append(f"git checkout {commit}" + ("  # and local changes" if dirty else ""))
        shown.append(line)
    return shown


def _state_rows(record: Record) -> list[tuple[str, str, str]]:
    """The state of the device before and after the timings: label, before, after; without facts that it never told."""
    before, after = _facts_of(record.state_before), _facts_of(record.state_after)
    rows = [(label, value, after.get(label, NONE)) for label, value in before.items()]
    return [row for row in rows if row[1:] != (NONE, NONE)]


def _facts_of(state: DeviceState) -> dict[str, str]:
    facts: dict[str, object] = {
        **{f"temperature {zone}": f"{value:.1f} °C" for zone, value in state.temperatures_c.items()},
        "battery, %": state.battery_percent,
        "charging": state.charging,
        "clock governor": state.governor,
        "cores online": state.online_cores,
        "cores allowed": state.affinity,
        "load average": state.load_average_1min,
    }
    words = {"None": NONE, "True": "yes", "False": "no"}
    return {label: words.get(str(value), str(value)) for label, value in facts.items()}


def _verdict(records: Sequence[Record]) -> dict[str, str]:
    """The banner: a class for its colour, a headline, one sentence."""
    failed = [record for record in records if not record.holds]
    doubtful = [record for record in records if record.outcome is Outcome.INCONCLUSIVE]
    gates = sum(len(record.gates) for record in records)
    things = "1 artifact" if len(records) == 1 else f"{len(records)} artifacts"
    if failed:
        names = ", ".join(f"{record.artifact} ({record.outcome.value})" for record in failed)
        return {"css": "fail", "title": f"{len(failed)} of {things} failed", "text": names}
    if doubtful:
        noise = f"{gates} gates, none failed; timings of {len(doubtful)} too noisy to judge"
        return {"css": "inconclusive", "title": f"{things}: correct, speed inconclusive", "text": noise}
    return {"css": "pass", "title": f"{things}: every gate holds", "text": f"{gates} gates"}


def _table_row(record: Record) -> dict[str, str]:
    """The summary's cells by column name, with the losses of quantization and lowering."""
    cells = dict(zip(summary.COLUMNS, summary.row(record), strict=True))
    quantization, lowering, total = record.accuracy.quantization, record.accuracy.lowering, record.accuracy.total
    cells["quant KL"] = loss.nats(quantization.mean_kl) if quantization else NONE
    cells["lowering KL"] = loss.nats(lowering.mean_kl) if lowering else NONE
    cells["ppl"] = _with_error(total.perplexity, total.perplexity_error) if total else NONE
    cells["css"] = _css(record.outcome)
    return cells


def _with_error(value: float, error: float) -> str:
    """`12.34 ± 0.56`, without decimals where they would mean nothing."""
    return f"{loss.perplexity(value)} ± {f'{error:.2f}' if value < 1e4 else f'{error:.0e}'}"


def _css(outcome: Outcome) -> str:
    return outcome.value if outcome in (Outcome.PASS, Outcome.INCONCLUSIVE) else "fail"


def _charts(records: Sequence[Record], manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Every plot that is not empty: title, SVG, one line that explains it, legend."""
    legend = [(record.artifact, i) for i, record in enumerate(records)]
    quantized = list({m.quantization.key: m for m in reversed(manifests) if _linears(m)}.values())
    layers = [(_name_of(m), i) for i, m in enumerate(quantized)]
    drawn = [
        _chart("Size", _size_plot(records), "Bytes of the artifact that ships, without tokenizer files.", []),
        _chart("Decode", _speed_plot(records, generation=True), "Tokens per second; dots are repeats.", []),
        _chart("Prefill", _speed_plot(records, generation=False), "Prompt tokens per second; dots are repeats.", []),
        _chart("KL per decode step", _step_plot(records), "Quantized model → artifact, nats, filling cache.", legend),
        _chart("KL per text", _slice_plot(records, lambda comparison: comparison.by_domain), _SHIPPED, legend),
        _chart("KL per position", _slice_plot(records, lambda comparison: comparison.by_position), _SHIPPED, legend),
        _chart("Weight SQNR per layer", _layer_plot(quantized), "Linears, in execution order, dB.", layers),
    ]
    for described in quantized:  # those that promoted linears: which, and the loss at every other size
        name = _name_of(described)
        note = "Framed: promoted. Stronger: rounding it alone costs more KL."
        drawn.append(_chart(f"Bits per linear: {name}", choice_map(described), note, []))
        note = "Expected held-out KL, most saved per byte first, scaled to what was measured (dot)."
        drawn.append(_chart(f"Size and loss: {name}", front(described), note, []))
    return [chart for chart in drawn if chart["svg"]]


def _chart(title: str, svg: str, note: str, legend: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """One plot with title, explanation and legend; one with a legend is drawn wider."""
    return {"title": title, "svg": svg, "note": note, "legend": legend, "wide": bool(legend)}


def _rate(mean: float, deviation: float) -> str:
    """`12.3 ± 0.4`, whole numbers from 100 on."""
    return f"{mean:.1f} ± {deviation:.1f}" if mean < 100 else f"{mean:,.0f} ± {deviation:,.0f}"


def _size_plot(records: Sequence[Record]) -> str:
    rows = [
        Bar(record.artifact, record.size_bytes / 1e6, f"{record.size_bytes / 1e6:,.1f} MB", (), i)
        for i, record in enumerate(records)
    ]
    return charts.bars(rows, "artifact size in megabytes")


def _speed_plot(records: Sequence[Record], *, generation: bool) -> str:
    """Tokens per second with every repeat; empty when nothing was timed."""
    rows = []
    for i, record in enumerate(records):
        for test in record.timings.tests if record.timings else ():
            if bool(test.n_gen) == generation:
                suffix = "" if generation else f" · {test.n_prompt} tokens"
                value = _rate(test.avg_ts, test.stddev_ts)
                rows.append(Bar(record.artifact + suffix, test.avg_ts, value, test.samples_ts, i))
    return charts.bars(rows, "tokens per second") if rows else ""


def _step_plot(records: Sequence[Record]) -> str:
    series = [
        Series(record.artifact, record.accuracy.lowering.kl_by_step, i)
        for i, record in enumerate(records)
        if record.accuracy.lowering
    ]
    label, x_label = "KL divergence per decode step", "decode step (0: after the prefill)"
    return charts.lines(series, label=label, x_label=x_label, log=True) if series else ""


def _slice_plot(records: Sequence[Record], slices: Callable[[Comparison], dict[str, Slice]]) -> str:
    """Mean KL as shipped of every slice of one kind, one dot per artifact; empty when none was measured."""
    losses = {i: slices(record.accuracy.total) for i, record in enumerate(records) if record.accuracy.total}
    if not losses:
        return ""
    labels = list(dict.fromkeys(label for parts in losses.values() for label in parts))
    series = [Series(records[i].artifact, [parts[label].mean_kl for label in labels], i) for i, parts in losses.items()]
    return charts.dots(labels, series, "mean KL divergence as shipped")


def _layer_plot(quantized: Sequence[Manifest]) -> str:
    series = [Series(_name_of(m), _linears(m), i) for i, m in enumerate(quantized)]
    return charts.lines(series, label="weight SQNR per layer", x_label="quantized weight", log=False) if series else ""


def _linears(described: Manifest) -> list[float]:
    """SQNR of the linears inside the layers; embedding and head have more bits and would flatten the plot."""
    inside = described.architecture.linear_shapes()
    return [layer.sqnr_db for layer in described.quantization.layers if layer.name in inside]


def _name_of(described: Manifest) -> str:
    return f"{described.plan.name} {described.plan.quant.name}"


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
    chosen = [c for c in candidates if c.promoted]
    expected = sum(c.promoted_kl if c.promoted else c.kl for c in candidates)
    points = pareto(candidates, smallest_mb(described), info.held_out_kl / expected)
    mb = smallest_mb(described) + sum(c.extra_bytes for c in chosen) / 1e6
    x = charts.linear([mb for mb, _ in points], charts.LEFT, charts.RIGHT)
    y = charts.logarithmic([kl for _, kl in points], charts.BOTTOM, charts.TOP)
    title = f"{mb:.1f} MB, KL {info.held_out_kl:.4f}, {len(chosen)} of {len(candidates)} linears promoted"
    parts = [
        *charts.axes(x, y, "MB of all weights"),
        charts.polyline([(x(mb), y(kl)) for mb, kl in points], 0, "expected KL"),
        charts.circle(x(mb), y(info.held_out_kl), title=title, fill=charts.colour(3)),
        charts.text(charts.RIGHT, charts.TOP + 12, title, charts.STRONG, "end"),
    ]
    return charts.inline(charts.HEIGHT, "size and expected KL", parts)


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
