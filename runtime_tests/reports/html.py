"""One self-contained HTML page per run: verdict, recipes, numbers, plots, gates, environment. Loads nothing."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.build import request
from export.errors import told
from export.formats import storage
from export.manifest import UNKNOWN, Manifest
from export.toolbox import charts
from export.toolbox.inspection import numbers
from export.toolbox.tables import NONE, number
from runtime_tests.checks import loss
from runtime_tests.evidence.record import DeviceState, Outcome, Record

from . import meanings, plots, summary, templates
from .overview import MOST_RUNS, Run

_TEMPLATE = Path(__file__).parent / "report.html.j2"


def render(
    records: Sequence[Record], manifests: Sequence[Manifest], runs: Sequence[Run] = (), up: str = "../.."
) -> str:
    """The page; `manifests` are those of the records, in the same order.

    `runs` are earlier ones, whose pages it links; `up` leads from the page's folder to build/.
    """
    first = records[0]
    rates = (r.latency.read_bandwidth_bytes_per_s for r in records if r.latency)
    names = names_of(records)
    return templates.render(
        _TEMPLATE,
        cache=storage.cache,
        records=records,
        names=names,
        manifests=manifests,
        verdict=_verdict(records),
        rows=[_table_row(record) for record in records],
        recipes=_recipes(records, manifests, names),
        losses=[*zip(names, loss.tables(records), strict=True)],
        loss_columns=loss.COLUMNS,
        figures=plots.figures(records, manifests, names),
        meaning=meanings.of,
        number=number,
        numbers=numbers,
        css=_css,
        series=charts.SERIES,
        commands=_commands(records, manifests),
        run=first,
        runs=runs,
        most_runs=MOST_RUNS,
        up=up,
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
            shown.append(told(f"git checkout {commit}") + ("  # and local changes" if dirty else ""))
        shown.append(line)
    return shown


def names_of(records: Sequence[Record]) -> list[str]:
    """What the page calls each artifact: its id, and its folder as well where two have the same id."""
    count = Counter(record.artifact for record in records)
    return [f"{r.artifact} in {r.folder or UNKNOWN}" if count[r.artifact] > 1 else r.artifact for r in records]


def _recipes(records: Sequence[Record], manifests: Sequence[Manifest], names: Sequence[str]) -> list[dict[str, Any]]:
    """What was quantized and how, once for all artifacts that share it, with a row for each of them."""
    groups: list[dict[str, Any]] = []
    for name, record, described in zip(names, records, manifests, strict=True):
        same = (described.quantization, described.checkpoint, described.plan.name, described.plan.quant.name)
        group = next((group for group in groups if group["same"] == same), None)
        if group is None:
            group = {"same": same, "manifest": described, "artifacts": [], **_recipe(record, described)}
            groups.append(group)
        group["artifacts"].append((name, record, described, _file_bits(described)))
    return groups


def _recipe(record: Record, described: Manifest) -> dict[str, Any]:
    """The facts that artifacts of one quantization share."""
    info, checkpoint = described.quantization.calibration, described.checkpoint
    calibrated = f"{info.tokens:,} tokens of {len(info.texts)} texts" if info else "no text"
    if info and info.held_out_kl is not None:
        calibrated += f"; KL {loss.nats(info.held_out_kl)} on held-out windows"
    facts = {
        "weights": storage.line(described),
        "bits per weight": f"{described.quantization.bits_per_weight:.2f}: integers, scales, and floats of 32 bits",
        "promoted": _promoted(described),
        "calibrated with": calibrated,
        "checkpoint": checkpoint.description,
        "from": checkpoint.origin,
        "bits before": _before(described),
        "double quantization": _detour(record, described),
        "integers taken over": described.quantization.from_checkpoint or "none: the checkpoint holds no integers",
    }
    return {"parts": storage.parts(described), "facts": facts}


def _promoted(described: Manifest) -> str:
    """How many linears got more bits than the recipe's own scheme; the table beside it tells which."""
    info = described.quantization.calibration
    if info is None or not info.candidates:
        return "none: the recipe promotes no linears"
    return f"{sum(c.promoted for c in info.candidates)} of {len(info.candidates)} linears, by KL saved per byte"


def _before(described: Manifest) -> str:
    """Bits per weight of the checkpoint's own files."""
    bits = described.checkpoint.bits_per_weight
    if bits is None:
        return "none: random weights"
    return f"{bits:.1f} per weight: {'quantized before' if described.checkpoint.quantized_before else 'floats'}"


def _detour(record: Record, described: Manifest) -> str:
    """What it costs that the checkpoint was quantized before."""
    if not described.checkpoint.quantized_before:
        return "no: the checkpoint was not quantized before"
    layers, second = described.quantization.layers, record.accuracy.quantization
    if layers and all(layer.kept for layer in layers):
        return "no: every integer is the checkpoint's own"
    lost = f"KL {loss.nats(second.mean_kl)}" if second else UNKNOWN
    return f"yes: the second time lost {lost}; what the first one lost is unknown without the floats before it"


def _file_bits(described: Manifest) -> str:
    """Bits of the model's file for each number of the checkpoint: what is stored twice or in 16 bits counts so."""
    return f"{8 * described.artifact_bytes / described.architecture.parameters:.2f}"


def _state_rows(record: Record) -> list[tuple[str, str, str]]:
    """The state of the device before and after the timings: label, before, after; without facts that it never told."""
    before, after = _facts_of(record.state_before), _facts_of(record.state_after)
    rows = [(label, value, after.get(label, NONE)) for label, value in before.items()]
    return [row for row in rows if row[1:] != (NONE, NONE)]


def _facts_of(state: DeviceState) -> dict[str, str]:
    facts: dict[str, object] = {
        **{f"temperature {zone}": f"{value:.1f} °C" for zone, value in state.temperatures_c.items()},
        "battery, %": state.battery_percent,
        "on mains": state.charging,
        "saves energy": state.low_power,
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
    return cells


def _with_error(value: float, error: float) -> str:
    """`12.34 ± 0.56`, without decimals where they would mean nothing."""
    return f"{loss.perplexity(value)} ± {f'{error:.2f}' if value < 1e4 else f'{error:.0e}'}"


def _css(outcome: Outcome) -> str:
    return outcome.value if outcome in (Outcome.PASS, Outcome.INCONCLUSIVE) else "fail"
