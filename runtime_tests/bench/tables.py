"""A benchmark as rows of text, header first; a table of which nothing was measured has no rows."""

from collections.abc import Callable, Iterable, Mapping
from statistics import mean
from typing import TypeVar

from export.toolbox.tables import NONE, Row

from .results import Benchmark, Entry, Fidelity, File, Metric, Spread, Timing

Item = TypeVar("Item")
_Cell = Callable[[Entry], str]
_CONTENDER: dict[str, _Cell] = {"artifact": lambda entry: entry.label, "runtime": lambda entry: entry.runtime}
_ALLOWANCE_BYTES = 150_000_000
"""What a runtime may take beside the model and its cache: the bound that peak memory is shown beside."""


def measured(run: Benchmark) -> list[Row]:
    """A row per contender: size, times, rates, memory, accuracy; medians with p10 and p90 behind them."""
    accuracy = {fidelity.contender: fidelity for fidelity in run.fidelity if fidelity.positions}

    def peak(entry: Entry) -> str:
        spread = run.spread(entry.name, lambda timing: timing.peak_rss_bytes / 1e6)
        return f"{spread.median:.0f}" if spread else NONE

    columns = _CONTENDER | {
        "MB": lambda entry: _megabytes(entry.size_bytes),
        "load s": _spread(run, lambda timing: timing.load_ns / 1e9, 2),
        f"TTFT {min(run.settings.prompts)} ms": _spread(run, lambda timing: timing.ttft_s() * 1e3, 0),
        **{f"prefill {length} tok/s": _spread(run, prefill(length), 0) for length in run.settings.prompts},
        f"decode {run.settings.generate} tok/s": _spread(run, Timing.decode_tps, 1),
        "peak RSS MB": peak,
        "KL to fp32": lambda entry: f"{accuracy[entry.name].mean_kl:.3f}" if entry.name in accuracy else NONE,
        "top-1": lambda entry: f"{accuracy[entry.name].top1:.1%}" if entry.name in accuracy else NONE,
    }
    return _rows(run.entries, columns)


def compared(run: Benchmark) -> list[Row]:
    """A row per pair, ours over stock, above 1 is more: medians of each repetition's ratios, with their quartiles."""
    entries = {entry.name: entry for entry in run.entries}
    pairs = [(ours, entries[name]) for ours in run.entries for name in ours.against if name in entries]

    def cell(metric: Metric) -> Callable[[tuple[Entry, Entry]], str]:
        return lambda pair: _text(run.ratio(pair[0].name, pair[1].name, metric))

    def verdict(pair: tuple[Entry, Entry]) -> str:
        ratio = run.ratio(pair[0].name, pair[1].name, Timing.decode_tps)
        return ratio.verdict if ratio else NONE

    def fastest(pair: tuple[Entry, Entry]) -> str:
        ours, theirs = (run.fastest_decode_tps(entry.name) for entry in pair)
        return f"{ours / theirs:.2f}" if ours and theirs else NONE

    far = {f"decode at {run.settings.far_position}": cell(Timing.far_decode_tps)} if run.settings.far_prompt else {}
    columns: dict[str, Callable[[tuple[Entry, Entry]], str]] = {
        "ours": lambda pair: f"{pair[0].label}, {pair[0].runtime}",
        "stock": lambda pair: pair[1].label,
        "decode": cell(Timing.decode_tps),
        "so decode is": verdict,
        "decode, fastest pass": fastest,
        **far,
        **{f"prefill {length}": cell(prefill(length)) for length in run.settings.prompts},
        "load time": cell(lambda timing: timing.load_ns / 1e9),
        "peak RSS": cell(lambda timing: timing.peak_rss_bytes),
        "size": lambda pair: f"{pair[0].size_bytes / pair[1].size_bytes:.2f}",
    }
    return _rows(pairs, columns)


def long_context(run: Benchmark) -> list[Row]:
    """A row per contender: decoding far into the cache against decoding near its beginning."""
    if not run.settings.far_prompt:
        return []
    columns = _CONTENDER | {
        f"decode at {run.settings.near_position} tok/s": _spread(run, Timing.decode_tps, 1),
        f"decode at {run.settings.far_position} tok/s": _spread(run, Timing.far_decode_tps, 1),
        "far over near": _spread(run, lambda timing: timing.far_decode_tps() / timing.decode_tps(), 2),
    }
    return _rows(run.entries, columns)


def memory(run: Benchmark) -> list[Row]:
    """A row per contender: model + cache of the whole context + 150 MB, and the most that any repetition held."""

    def cache(entry: Entry) -> int:
        return entry.kv_bytes_per_position * run.settings.context

    def most(metric: Metric) -> _Cell:
        return lambda entry: f"{max(values) / 1e6:.0f}" if (values := run.values(entry.name, metric).values()) else NONE

    columns = _CONTENDER | {
        "model MB": lambda entry: _megabytes(entry.size_bytes),
        "cache MB": lambda entry: _megabytes(cache(entry)),
        "model + cache + 150 MB": lambda entry: f"{(entry.size_bytes + cache(entry) + _ALLOWANCE_BYTES) / 1e6:.0f}",
        f"peak RSS after {max(run.settings.prompts)} tokens MB": most(lambda timing: timing.peak_rss_bytes),
    }
    if run.settings.far_prompt:
        columns[f"peak RSS after {run.settings.far_prompt} tokens MB"] = most(lambda timing: timing.far_peak_rss_bytes)
    return _rows(run.entries, columns)


def bandwidth(run: Benchmark) -> list[Row]:
    """A row per contender: bytes each decoded token must read, and the share of the bound it reaches."""

    def cache(position: int) -> _Cell:
        return lambda entry: _megabytes(entry.kv_bytes_per_position * position)

    def share(position: int, metric: Metric) -> _Cell:
        return lambda entry: _text(run.bound_share(entry, metric, position))

    columns = _CONTENDER | {"weights MB/token": lambda entry: _megabytes(entry.weight_bytes_per_token)}
    places: dict[int, Metric] = {run.settings.near_position: Timing.decode_tps}
    if run.settings.far_prompt:
        places[run.settings.far_position] = Timing.far_decode_tps
    for position, metric in places.items():
        columns[f"cache at {position} MB"] = cache(position)
        columns[f"share of bandwidth at {position}"] = share(position, metric)
    return _rows(run.entries, columns)


def overheads(run: Benchmark) -> list[Row]:
    """A row per session of ours: what a step spends around the runtime's call."""
    return _rows(
        run.overheads,
        {
            "session": lambda overhead: overhead.label,
            "step ms": lambda overhead: f"{overhead.step_s * 1e3:.2f}",
            "of it our code µs": lambda overhead: f"{overhead.own_s * 1e6:.0f}",
            "share of the step": lambda overhead: f"{overhead.share:.1%}",
        },
    )


def exports(run: Benchmark) -> list[Row]:
    """A row per exporter; a time without a load average is left out, for other work may have run beside it."""
    return _rows(
        [cost for cost in run.exports if cost.load_average_1min is not None],
        {
            "exporter": lambda cost: cost.label,
            "seconds": lambda cost: f"{cost.seconds:.0f}",
            "peak RSS GB": lambda cost: f"{cost.peak_rss_bytes / 1e9:.1f}",
            "load average when it started": lambda cost: f"{cost.load_average_1min:.1f}",
        },
    )


def domains(run: Benchmark) -> list[Row]:
    """What `rated` shows, of the contenders of a benchmark that were judged on several kinds of text."""
    entries = {entry.name: entry for entry in run.entries}
    return rated((entries[loss.contender], loss) for loss in run.fidelity if len(loss.kl_by_domain) > 1)


def rated(files: Iterable[tuple[File, Fidelity]]) -> list[Row]:
    """A row per file: mean KL to the fp32 model on each kind of text, the least first."""
    judged = sorted((file for file in files if file[1].kl_by_domain), key=lambda file: overall(file[1]))

    def mean_kl(kind: str) -> Callable[[tuple[File, Fidelity]], str]:
        return lambda file: f"{file[1].kl_by_domain[kind]:.4f}"

    columns: dict[str, Callable[[tuple[File, Fidelity]], str]] = {
        "artifact": lambda file: file[0].label,
        "runtime": lambda file: file[0].runtime,
        "MB": lambda file: _megabytes(file[0].size_bytes),
        "KL, mean of all kinds": lambda file: f"{overall(file[1]):.4f}",
        **{kind: mean_kl(kind) for _, loss in judged[:1] for kind in loss.kl_by_domain},
        "top-1": lambda file: f"{file[1].top1:.1%}",
    }
    return _rows(judged, columns)


def overall(fidelity: Fidelity) -> float:
    """Mean KL, nats. Every kind of text counts alike, however many tokens it has."""
    return mean(fidelity.kl_by_domain.values())


SHOWN = (measured, long_context, memory, bandwidth, overheads, exports, domains, compared)
"""Every table, as the terminal shows them."""


def prefill(length: int) -> Metric:
    """The rate of one prompt length."""
    return lambda timing: timing.prefill_tps(length)


def _rows(items: Iterable[Item], columns: Mapping[str, Callable[[Item], str]]) -> list[Row]:
    body: list[Row] = [tuple(cell(item) for cell in columns.values()) for item in items]
    return [tuple(columns), *body] if body else []


def _spread(run: Benchmark, metric: Metric, digits: int) -> _Cell:
    return lambda entry: _text(run.spread(entry.name, metric), digits)


def _text(spread: Spread | None, digits: int = 2) -> str:
    return spread.text(digits) if spread else NONE


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"
