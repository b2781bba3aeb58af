"""Long contexts, memory, bandwidth and host overhead of a benchmark as rows of text. Shows nothing itself."""

from .results import Benchmark, Entry
from .table_text import NONE, Row, with_spread
from .timing import Timing

ALLOWANCE_BYTES = 150_000_000
"""What a runtime may take beside the model and its cache, as the bar beside peak memory counts it."""


def long_context(run: Benchmark) -> list[Row]:
    """Header and a row per contender: decoding far into the cache against decoding near its beginning."""
    if not run.settings.far_prompt:
        return []
    near, far = run.settings.near_position, run.settings.far_position
    header: Row = ("artifact", "runtime", f"decode at {near} tok/s", f"decode at {far} tok/s", "far over near")
    return [header, *(long_context_row(run, entry) for entry in run.entries)]


def long_context_row(run: Benchmark, entry: Entry) -> Row:
    """One contender."""
    return (
        entry.label,
        entry.runtime,
        with_spread(run.spread(entry.name, decode), 1),
        with_spread(run.spread(entry.name, far_decode), 1),
        with_spread(run.spread(entry.name, lambda timing: timing.far_decode_tps / timing.decode_tps), 2),
    )


def memory(run: Benchmark) -> list[Row]:
    """Header and a row per contender: peak memory, and model + cache of the whole context + 150 MB."""
    far = (f"peak RSS after {run.settings.far_prompt} tokens MB",) if run.settings.far_prompt else ()
    header: Row = ("artifact", "runtime", "model MB", "cache MB", "model + cache + 150 MB")
    header += (f"peak RSS after {max(run.settings.prompts)} tokens MB", *far)
    return [header, *(memory_row(run, entry) for entry in run.entries)]


def memory_row(run: Benchmark, entry: Entry) -> Row:
    """One contender; the most that any repetition held."""
    cache = entry.kv_bytes_per_position * run.settings.context
    near = most(run.values(entry.name, lambda timing: timing.peak_rss_bytes))
    far = most(run.values(entry.name, lambda timing: timing.far_peak_rss_bytes))
    return (
        entry.label,
        entry.runtime,
        f"{entry.size_bytes / 1e6:.1f}",
        f"{cache / 1e6:.1f}",
        f"{(entry.size_bytes + cache + ALLOWANCE_BYTES) / 1e6:.0f}",
        near,
        *((far,) if run.settings.far_prompt else ()),
    )


def most(values: dict[int, float]) -> str:
    """The largest of some sizes, MB."""
    return f"{max(values.values()) / 1e6:.0f}" if values else NONE


def bandwidth(run: Benchmark) -> list[Row]:
    """Header and a row per contender: bytes each decoded token must read, and the share of the bound it reaches."""
    places = (run.settings.near_position, *((run.settings.far_position,) if run.settings.far_prompt else ()))
    header: Row = ("artifact", "runtime", "weights MB/token")
    header += tuple(part for n in places for part in (f"cache at {n} MB", f"share of bandwidth at {n}"))
    return [header, *(bandwidth_row(run, entry) for entry in run.entries)]


def bandwidth_row(run: Benchmark, entry: Entry) -> Row:
    """One contender."""
    near, far = run.settings.near_position, run.settings.far_position
    found = [(near, run.bound_share(entry, decode, near))]
    if run.settings.far_prompt:
        found.append((far, run.bound_share(entry, far_decode, far)))
    cells = (
        (f"{entry.kv_bytes_per_position * position / 1e6:.1f}", with_spread(share, 2)) for position, share in found
    )
    return (
        entry.label,
        entry.runtime,
        f"{entry.weight_bytes_per_token / 1e6:.1f}",
        *(cell for pair in cells for cell in pair),
    )


def overheads(run: Benchmark) -> list[Row]:
    """Header and a row per session of ours: what a step spends around the runtime's call."""
    header: Row = ("session", "step ms", "of it our code µs", "share of the step")
    rows = [
        (found.label, f"{found.step_s * 1e3:.2f}", f"{found.own_s * 1e6:.0f}", f"{found.share:.1%}")
        for found in run.overheads
    ]
    return [header, *rows] if rows else []


def decode(timing: Timing) -> float:
    """The rate near the beginning of the cache."""
    return timing.decode_tps


def far_decode(timing: Timing) -> float:
    """The rate far into it."""
    return timing.far_decode_tps
