"""Rates, accuracy, ratios and export times of a benchmark as rows of text. Knows nothing about where they are shown."""

from collections.abc import Callable

from .results import Benchmark, Entry, Fidelity
from .table_text import NONE, Row, with_quartiles, with_spread
from .timing import Timing


def measured(run: Benchmark) -> list[Row]:
    """Header and a row per contender: size, times, rates, memory, accuracy."""
    first = min(run.settings.prompts)
    prefills = (f"prefill {n} tok/s" for n in run.settings.prompts)
    decode = f"decode {run.settings.generate} tok/s"
    header: Row = ("artifact", "runtime", "MB", "load s", f"TTFT {first} ms", *prefills, decode)
    header += ("peak RSS MB", "KL to fp32", "top-1")
    return [header, *(measured_row(run, entry) for entry in run.entries)]


def measured_row(run: Benchmark, entry: Entry) -> Row:
    """One contender: medians with p10 and p90 behind them."""

    def cell(metric: Callable[[Timing], float], digits: int) -> str:
        return with_spread(run.spread(entry.name, metric), digits)

    rates = (cell(prefill(n), 0) for n in run.settings.prompts)
    memory = run.spread(entry.name, lambda timing: timing.peak_rss_bytes / 1e6)
    return (
        entry.label,
        entry.runtime,
        f"{entry.size_bytes / 1e6:.1f}",
        cell(lambda timing: timing.load_ns / 1e9, 2),
        cell(lambda timing: timing.ttft_s * 1e3, 0),
        *rates,
        cell(lambda timing: timing.decode_tps, 1),
        f"{memory.median:.0f}" if memory else NONE,
        *accuracy_cells(run, entry.name),
    )


def prefill(length: int) -> Callable[[Timing], float]:
    """The metric of one prompt length."""
    return lambda timing: timing.prefill_tps(length)


def accuracy_cells(run: Benchmark, name: str) -> Row:
    """Mean KL and top-1 agreement, where logits were compared."""
    found: Fidelity | None = next((f for f in run.fidelity if f.contender == name and f.positions), None)
    return (f"{found.mean_kl:.3f}", f"{found.top1:.1%}") if found else (NONE, NONE)


def compared(run: Benchmark) -> list[Row]:
    """Header and a row per pair, ours over stock: above 1 is more."""
    prefills = (f"prefill {n}" for n in run.settings.prompts)
    far = (f"decode at {run.settings.far_position}",) if run.settings.far_prompt else ()
    header: Row = ("ours", "stock", "decode", "so decode is", "decode, fastest pass", *far, *prefills)
    header += ("load time", "peak RSS", "size")
    by_name = {entry.name: entry for entry in run.entries}
    pairs = [(ours, by_name[name]) for ours in run.entries for name in ours.against if name in by_name]
    return [header, *(compared_row(run, ours, theirs) for ours, theirs in pairs)]


def compared_row(run: Benchmark, ours: Entry, theirs: Entry) -> Row:
    """One pair: medians of the ratios of each repetition, with their quartiles."""

    def cell(metric: Callable[[Timing], float]) -> str:
        return with_quartiles(run.ratio(ours.name, theirs.name, metric))

    decode = run.ratio(ours.name, theirs.name, lambda timing: timing.decode_tps)
    return (
        f"{ours.label}, {ours.runtime}",
        theirs.label,
        with_quartiles(decode),
        decode.verdict if decode else NONE,
        fastest(run, ours.name, theirs.name),
        *((cell(lambda timing: timing.far_decode_tps),) if run.settings.far_prompt else ()),
        *(cell(prefill(n)) for n in run.settings.prompts),
        cell(lambda timing: timing.load_ns / 1e9),
        cell(lambda timing: timing.peak_rss_bytes),
        f"{ours.size_bytes / theirs.size_bytes:.2f}",
    )


def fastest(run: Benchmark, ours: str, theirs: str) -> str:
    """Ratio of the two fastest passes; no spread, for each is one number."""
    rates = run.fastest_decode_tps(ours), run.fastest_decode_tps(theirs)
    return f"{rates[0] / rates[1]:.2f}" if rates[0] and rates[1] else NONE


def exports(run: Benchmark) -> list[Row]:
    """Header and a row per exporter; a time means nothing where it is not known what else ran."""
    header: Row = ("exporter", "seconds", "peak RSS GB", "load average when it started")
    rows = [
        (
            cost.label,
            f"{cost.seconds:.0f}",
            f"{cost.peak_rss_bytes / 1e9:.1f}",
            f"{cost.load_average_1min:.1f}",
        )
        for cost in run.exports
        if cost.load_average_1min is not None
    ]
    return [header, *rows]
