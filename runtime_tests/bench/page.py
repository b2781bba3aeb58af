"""The page of one benchmark run. Knows nothing about how it was measured, or of other models' pages."""

from collections.abc import Mapping

from . import bound_tables, domain_table, tables
from .results import Benchmark
from .table_text import Row, markdown

HOW = """\
Every repetition runs each row once, in a process of its own, in rotating order (A B C …, then B C … A), so that what \
slows the machine for a while slows all of them. Each process loads, runs one prompt that packs weights, drops one \
pass of every kind and keeps {passes}. All rows use {threads} threads, batch 1, greedy choice and a cache of {context} \
slots. A cell is the median over {repetitions} repetitions with p10–p90 behind it; a ratio is the median of the ratios \
within each repetition, with its quartiles. "faster" or "slower" is said when the quartiles lie on one side of 1. \
"Fastest pass" compares the one fastest pass of each side, on a busy machine the closest to a quiet one. \
TTFT is a warm prompt: tokens in, logits of the last one out."""

LONG = """\
After its other passes every process prefills {far_prompt} tokens and times {far_generate} more, once. Positions are \
those in the middle of the timed tokens. llama.cpp's cache holds float16 by default; the table of memory says what \
each one takes."""

DOMAINS = "Mean KL in nats to the fp32 checkpoint over the positions of each kind; the kinds count alike."

MEMORY = """\
The most that any repetition held. The cache counts with all {context} slots. Files mapped into memory count as far as \
they were read; rows in Python count its libraries too (torch among them for .pte)."""

BANDWIDTH = """\
Bytes are those of the artifact: all linears and the head with their scales; nothing of a table in which only rows are \
looked up. What a runtime packs them into may be larger. The share is decode rate × bytes over the read bandwidth, \
measured at the beginning of each repetition as a plain sum over 256 MiB with the same threads: {bandwidth} GB/s. \
Where the model fits a processor's caches it can exceed 1."""

OVERHEAD = """\
{steps} steps of each of our Python sessions: the whole step against the runtime's call inside it. The C++ runner \
times its own steps and reports no time outside them."""

READ = """\
- The stock ONNX artifact is written without `intra_op_num_threads`, and onnxruntime-genai then computes with half of \
the logical cores (one thread on a two-core machine). Here every onnxruntime-genai row gets the same number.
- Both stock exporters quantize the head to int4 in groups (`export_llm`'s 8da4w takes every linear), ours is int8 per \
channel: ours reads more bytes for each decoded token. The builder's other row has an int8 head too, in groups, and \
pays with a float embedding: its options cannot share an int8 table (version 0.18), nor does `rtn_last` change a tied \
head.
- Both .pte files are stepped by the same Python calls; TextLLMRunner is ExecuTorch's own loop and counts \
milliseconds, tokenization and sampling included. Our C++ runner, the one for devices, times its own steps; each of \
its passes is a process of its own, and its memory is without Python and torch.
- llama.cpp: its own mixtures at default settings, quantized by itself from our weights as a GGUF without vocabulary, \
memory-mapped, flash attention and weight repacking at their defaults, stepped by its C functions.
- Stepped rows time the model alone, the others choose the token inside the clock.
- KL and top-1 agreement: mean over {positions} positions of the evaluation `{evaluation}` against the fp32 \
checkpoint, prefill and then token by token through the runtime of the row. Compare rows, not models: {checkpoint}."""


def render(run: Benchmark, figures: Mapping[str, str]) -> str:
    """The whole page; `figures` are files beside it and what they show."""
    sections = {
        "Ratios, ours over stock": ratios(run),
        "Figures": [f"![{label}]({file})" for file, label in figures.items()],
        "Measured": [markdown(tables.measured(run)), missing(run), did_not_run(run)],
        "Accuracy by kind of text": table(domain_table.domains(run), DOMAINS),
        "Long contexts": table(bound_tables.long_context(run), LONG.format(**run.settings.model_dump())),
        "Memory": table(bound_tables.memory(run), MEMORY.format(**run.settings.model_dump())),
        "Bandwidth": table(bound_tables.bandwidth(run), BANDWIDTH.format(bandwidth=bandwidth(run))),
        "Host overhead": table(bound_tables.overheads(run), OVERHEAD.format(steps=run.settings.generate)),
        "How it was measured": [HOW.format(**run.settings.model_dump())],
        "How to read it": [READ.format(positions=positions(run), evaluation=run.evaluation, checkpoint=run.checkpoint)],
        "Export": exporters(run),
        "Conditions": [conditions(run)],
        "How the stock artifacts were made": commands(run),
    }
    parts = [
        f"# {run.model}, {run.quant}: ours against stock",
        f"The same weights ({run.checkpoint}), one interleaved run. All models: [benchmarks](../benchmarks.md).",
        f"Written by `{run.command}`; do not edit.",
    ]
    for title, contents in sections.items():
        parts += [f"## {title}", *contents] if contents else []
    return "\n\n".join(part for part in parts if part) + "\n"


def ratios(run: Benchmark) -> list[str]:
    """Pairs, where there are any."""
    rows = tables.compared(run)
    return table(rows, "Above 1 means more: tokens per second, seconds of loading, bytes.") if rows[1:] else []


def table(rows: list[Row], note: str) -> list[str]:
    """Rows and what they mean; nothing without rows."""
    return [markdown(rows), note] if rows else []


def missing(run: Benchmark) -> str:
    """Peers that could not be had."""
    return "\n".join(f"- not in the run: {name}: {why}" for name, why in run.missing.items())


def did_not_run(run: Benchmark) -> str:
    """Peers that failed."""
    return "\n".join(f"- did not run: {line}" for line in run.failures)


def bandwidth(run: Benchmark) -> str:
    """Range of the repetitions, GB/s."""
    rates = run.read_bandwidth_bytes_per_s
    return f"{min(rates) / 1e9:.1f}–{max(rates) / 1e9:.1f}"


def positions(run: Benchmark) -> int:
    """Scored positions of each compared artifact."""
    return max((found.positions for found in run.fidelity), default=0)


def exporters(run: Benchmark) -> list[str]:
    """Export times, when there are any."""
    if not run.exports:
        return []
    note = (
        "Whole processes from checkpoint to finished folder, once each; ours with an empty quantization cache, "
        "the stock ones given the weights in the form they read, timed when their artifacts were made. Not "
        "interleaved: what else ran then counts."
    )
    unknown = [cost.label for cost in run.exports if cost.load_average_1min is None]
    left_out = [f"Not shown: {', '.join(unknown)}, timed while something unknown ran beside it."] if unknown else []
    return [markdown(tables.exports(run)), note, *left_out]


def conditions(run: Benchmark) -> str:
    """Machine, versions, commit and date."""
    machine, tools = run.environment, run.environment.tools
    dirty = " with local changes" if run.dirty else ""
    loads = [sample.load_average_1min for sample in run.samples] or [0.0]
    lines = [
        f"- machine: {machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, {machine.os}",
        f"- load average (1 min): {machine.load_average_1min:.2f} before, {run.load_average_after:.2f} after; "
        f"{min(loads):.2f}–{max(loads):.2f} when a process started (our own work included)",
        f"- versions: Python {machine.python}, " + ", ".join(f"{name} {found}" for name, found in tools.items()),
        f"- commit: `{run.commit[:12]}`{dirty}",
        f"- date: {run.started_at}, {run.seconds / 60:.0f} minutes",
        f"- raw samples: [{run.model}_{run.quant}.json]({run.model}_{run.quant}.json), run `{run.run_id}`",
    ]
    return "\n".join(lines)


def commands(run: Benchmark) -> list[str]:
    """Each stock artifact once: its command and the versions that made it."""
    found: dict[str, str] = {}
    for entry in run.entries:
        if entry.made_by:
            found[entry.made_by] = ", ".join(f"{tool} {version}" for tool, version in entry.tools.items())
    return [f"```sh\n{command}\n```\n{tools}" for command, tools in found.items()]
