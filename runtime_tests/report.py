"""One self-contained HTML page per run: verdict, numbers, plots, gates, environment. Loads nothing from anywhere."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from export.manifest import Manifest

from . import choice_plots, loss, summary
from .plots import Bar, Series, bars, dots, lines
from .record import Comparison, DeviceState, Outcome, Record, Slice

TEMPLATE = "report.html.j2"
SHIPPED = "As shipped: Transformers fp32 → artifact, mean nats."


def render(records: Sequence[Record], manifests: Sequence[Manifest]) -> str:
    """The page; `manifests` are those of the records, in the same order."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first = records[0]
    rates = (r.latency.read_bandwidth_bytes_per_s for r in records if r.latency)
    return environment.get_template(TEMPLATE).render(
        records=records,
        manifests=manifests,
        verdict=verdict(records),
        rows=[table_row(record) for record in records],
        losses=list(zip(records, loss.tables(records), strict=True)),
        loss_columns=loss.COLUMNS,
        charts=charts(records, manifests),
        run=first,
        state=state_rows(first),
        memory_gb=f"{first.environment.memory_bytes / 1e9:.0f}",
        bandwidth=next((rate / 1e9 for rate in rates if rate), None),
        tools={name: version for name, version in first.environment.tools.items() if version != "not installed"},
    )


def state_rows(record: Record) -> list[tuple[str, str, str]]:
    """What the device said of itself before and after the timings: label, before, after."""
    before, after = record.state_before, record.state_after
    rows = [(f"temperature {zone}", f"{value:.1f} °C") for zone, value in before.temperatures_c.items()]
    later = [
        f"{after.temperatures_c[zone]:.1f} °C" if zone in after.temperatures_c else "–"
        for zone in before.temperatures_c
    ]
    rows += [(label, shown(value)) for label, value in facts_of(before)]
    later += [shown(value) for _, value in facts_of(after)]
    return [(label, was, now) for (label, was), now in zip(rows, later, strict=True) if (was, now) != ("–", "–")]


def facts_of(state: DeviceState) -> list[tuple[str, object]]:
    """The numbers beside the temperatures, with labels for people."""
    return [
        ("battery, %", state.battery_percent),
        ("charging", state.charging),
        ("clock governor", state.governor),
        ("cores online", state.online_cores),
        ("cores allowed", state.affinity),
        ("load average", state.load_average_1min),
    ]


def shown(value: object) -> str:
    """A fact, or a dash where the device does not tell."""
    words = {None: "–", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def verdict(records: Sequence[Record]) -> dict[str, str]:
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


def table_row(record: Record) -> dict[str, str]:
    """The summary's cells by column name, and what quantization and lowering lose."""
    cells = dict(zip(summary.COLUMNS, summary.row(record), strict=True))
    quantization, lowering, total = record.accuracy.quantization, record.accuracy.lowering, record.accuracy.total
    cells["quant KL"] = loss.nats(quantization.mean_kl) if quantization else "–"
    cells["lowering KL"] = loss.nats(lowering.mean_kl) if lowering else "–"
    cells["ppl"] = with_error(total.perplexity, total.perplexity_error) if total else "–"
    cells["css"] = css(record.outcome)
    return cells


def with_error(value: float, error: float) -> str:
    """`12.34 ± 0.56`, without decimals where they would mean nothing."""
    return f"{loss.perplexity(value)} ± {f'{error:.2f}' if value < 1e4 else f'{error:.0e}'}"


def css(outcome: Outcome) -> str:
    """Colour class of a verdict."""
    return outcome.value if outcome in (Outcome.PASS, Outcome.INCONCLUSIVE) else "fail"


def charts(records: Sequence[Record], manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Every plot that has something to show: title, SVG, one line that explains it, legend."""
    legend = [(record.artifact, i) for i, record in enumerate(records)]
    layers = layer_legend(manifests)
    drawn = [
        chart("Size", size_plot(records), "Bytes of the artifact that ships, without tokenizer files.", []),
        chart("Decode", speed_plot(records, generation=True), "Tokens per second; dots are repeats.", []),
        chart("Prefill", speed_plot(records, generation=False), "Prompt tokens per second; dots are repeats.", []),
        chart("KL per decode step", step_plot(records), "Quantized model → artifact, nats, filling cache.", legend),
        chart("KL per text", slice_plot(records, lambda one: one.by_domain), SHIPPED, legend),
        chart("KL per position", slice_plot(records, lambda one: one.by_position), SHIPPED, legend),
        chart("Weight SQNR per layer", layer_plot(manifests), "Linears, in execution order, dB.", layers),
    ]
    return [one for one in [*drawn, *choices(manifests)] if one["svg"]]


def choices(manifests: Sequence[Manifest]) -> Iterator[dict[str, Any]]:
    """Of each quantization that promoted linears: which, and what other sizes would have cost."""
    for one in quantizations(manifests).values():
        name = f"{one.plan.model.name} {one.plan.quant.name}"
        note = "Framed: promoted. Stronger: rounding it alone costs more KL."
        yield chart(f"Bits per linear: {name}", choice_plots.choice_map(one), note, [])
        note = "Expected held-out KL, most saved per byte first, scaled to what was measured (dot)."
        yield chart(f"Size and loss: {name}", choice_plots.front(one), note, [])


def chart(title: str, svg: str, note: str, legend: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """One plot with what surrounds it; those with a legend have axes and get more room."""
    return {"title": title, "svg": svg, "note": note, "legend": legend, "wide": bool(legend)}


def rate(mean: float, deviation: float) -> str:
    """`12.3 ± 0.4`, whole numbers from 100 on."""
    return f"{mean:.1f} ± {deviation:.1f}" if mean < 100 else f"{mean:,.0f} ± {deviation:,.0f}"


def size_plot(records: Sequence[Record]) -> str:
    """Megabytes per artifact."""
    rows = [
        Bar(record.artifact, record.size_bytes / 1e6, f"{record.size_bytes / 1e6:,.1f} MB", (), i)
        for i, record in enumerate(records)
    ]
    return bars(rows, "artifact size in megabytes")


def speed_plot(records: Sequence[Record], *, generation: bool) -> str:
    """Tokens per second with every repeat; empty when nothing was timed."""
    rows = []
    for i, record in enumerate(records):
        for test in record.timings.tests if record.timings else ():
            if bool(test.n_gen) == generation:
                suffix = "" if generation else f" · {test.n_prompt} tokens"
                value = rate(test.avg_ts, test.stddev_ts)
                rows.append(Bar(record.artifact + suffix, test.avg_ts, value, test.samples_ts, i))
    return bars(rows, "tokens per second") if rows else ""


def step_plot(records: Sequence[Record]) -> str:
    """KL over decode steps, one line per artifact."""
    series = [
        Series(record.artifact, record.accuracy.lowering.kl_by_step, i)
        for i, record in enumerate(records)
        if record.accuracy.lowering
    ]
    if not series:
        return ""
    return lines(series, label="KL divergence per decode step", x_label="decode step (0: after the prefill)", log=True)


def slice_plot(records: Sequence[Record], slices: Callable[[Comparison], dict[str, Slice]]) -> str:
    """Mean KL as shipped of every slice of one kind, one dot per artifact; empty when none was measured."""
    found = {i: slices(record.accuracy.total) for i, record in enumerate(records) if record.accuracy.total}
    if not found:
        return ""
    labels = list(dict.fromkeys(label for parts in found.values() for label in parts))
    series = [Series(records[i].artifact, [parts[label].mean_kl for label in labels], i) for i, parts in found.items()]
    return dots(labels, series, "mean KL divergence as shipped")


def quantizations(manifests: Sequence[Manifest]) -> dict[str, Manifest]:
    """One manifest per distinct quantization that has layers."""
    return {m.quantization.key: m for m in reversed(manifests) if linears(m)}


def layer_plot(manifests: Sequence[Manifest]) -> str:
    """Weight SQNR per layer, one line per quantization."""
    series = [
        Series(f"{m.plan.model.name} {m.plan.quant.name}", linears(m), i)
        for i, m in enumerate(quantizations(manifests).values())
    ]
    return lines(series, label="weight SQNR per layer", x_label="quantized weight", log=False) if series else ""


def linears(described: Manifest) -> list[float]:
    """SQNR of the linears inside the layers; embedding and head have other bits and would flatten the plot."""
    inside = described.architecture.linear_shapes()
    return [layer.sqnr_db for layer in described.quantization.layers if layer.name in inside]


def layer_legend(manifests: Sequence[Manifest]) -> list[tuple[str, int]]:
    """Which line is which quantization."""
    return [(f"{m.plan.model.name} {m.plan.quant.name}", i) for i, m in enumerate(quantizations(manifests).values())]
