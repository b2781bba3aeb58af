"""Writes records, reports and the measured rows of model cards."""

import errno
from collections.abc import Sequence
from pathlib import Path

from export import card, manifest
from export.card import Measured
from export.errors import ExportError
from export.host import disk
from export.host.console import console
from export.host.text import Markdown, code
from export.manifest import Manifest
from runtime_tests.checks import gates
from runtime_tests.checks.loss import nats, perplexity
from runtime_tests.evidence import record as records_file
from runtime_tests.evidence.record import Comparison, Latency, Record, Slice
from runtime_tests.tasks import results, tables

from . import html, overview


def keep(record: Record, build: Path, folder: Path, described: Manifest) -> None:
    """Write an artifact's record as soon as it exists, and its card."""
    records_file.append(record, build / "records" / "records.jsonl")
    records_file.append(record, build / "reports" / record.run_id / "records.jsonl")
    _write_card(folder, described, measured_rows(record) + task_rows(build, record.manifest_sha256))


def keep_tasks(build: Path, artifacts: Sequence[tuple[Path, Manifest]]) -> Path:
    """Write the page of task scores, and the scores of these artifacts into their cards."""
    for folder, described in artifacts:
        sha256 = manifest.digest(folder)
        record = records_file.newest_of(build / "records" / "records.jsonl", manifest_sha256=sha256)
        rows = measured_rows(record) if record else [Measured("verdict", "not validated", "tasks only")]
        _write_card(folder, described, rows + task_rows(build, sha256))
    return tables.write(results.compare(results.read_all(build)), build)


def _write_card(folder: Path, described: Manifest, rows: Sequence[Measured]) -> None:
    """The card, but in a folder that belongs to somebody else."""
    try:
        card.write(folder, described, rows)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        console.print(f"{folder / manifest.CARD}: not written ({error.strerror})", style="yellow", soft_wrap=True)


def task_rows(build: Path, manifest_sha256: str) -> list[Measured]:
    """Task scores of one build of an artifact; none and a warning where results files cannot be read."""
    try:
        compared = results.compare(results.read_all(build))
    except ExportError as error:
        console.print(f"no task scores in the card: {error}", style="yellow", soft_wrap=True)
        return []
    builds = [artifact for artifact in compared if artifact.newest.facts.get("manifest_sha256") == manifest_sha256]
    return [row for build_scores in builds for row in tables.card_rows(build_scores)]


def report(records: Sequence[Record], manifests: Sequence[Manifest], build: Path) -> Path:
    """Render the run's page, the latest one also as `build/report/index.html`, and `build/reports/index.html` over all.

    Each links those before it.
    """
    pages, latest = build / "reports", build / "report" / "index.html"
    run_id = records[0].run_id
    known = overview.entries(build)
    runs = overview.runs(build, known)
    earlier = [run for run in runs if run.has_page and run.run_id < run_id]
    latest.parent.mkdir(parents=True, exist_ok=True)
    disk.write_text(pages / run_id / "index.html", html.render(records, manifests, earlier, "../.."))
    disk.write_text(latest, html.render(records, manifests, earlier, ".."))
    disk.write_text(pages / "index.html", overview.render(build, known, overview.runs(build, known)))
    return latest


def measured_rows(record: Record) -> list[Measured]:
    """The card's table: verdict, accuracy, speed, machine and commit."""
    rows = [Measured("verdict", _verdict(record), f"{len(record.gates)} gates")]
    rows += [Measured("note", note, "of the verdict") for note in record.notes]
    if record.accuracy.total:
        rows += _total_rows(record.accuracy.total)
    if record.accuracy.quantization:
        rows += _quantization_rows(record.accuracy.quantization)
    if record.accuracy.lowering:
        rows += _lowering_rows(record.accuracy.lowering, record)
    if record.accuracy.cache:
        rows += _cache_rows(record.accuracy.cache)
    rows += _speed_rows(record.timings) if record.timings else []
    machine = record.environment
    rows.append(Measured("measured on", machine.cpu, f"{record.device}, {machine.os}, {machine.cores} cores"))
    dirty = " with local changes" if record.dirty else ""
    rows.append(Measured("measured by", Markdown(f"commit {code(record.commit[:12])}{dirty}"), record.started_at))
    return rows


def _verdict(record: Record) -> str:
    """The outcome and the gate that decided it. Details may tell paths of this machine: they stay in the record."""
    failed = [gates.failure(gate) for gate in record.gates if gate.verdict == "fail"]
    doubtful = [gate.detail for gate in record.gates if gate.verdict == "inconclusive"]
    return ": ".join([record.outcome.value, *(failed or doubtful)[:1]])


def _total_rows(measured: Comparison) -> list[Measured]:
    """The loss of the file as shipped, in all and for every kind of text and range of positions."""
    note = f"fp32 in Transformers → this file, {measured.positions:,} positions"
    ppl = f"{measured.perplexity:.2f} ± {measured.perplexity_error:.2f}"
    reference = f"{measured.reference_perplexity:.2f} ± {measured.reference_perplexity_error:.2f}"
    return [
        Measured("KL as shipped, mean (p99)", f"{nats(measured.mean_kl)} ({nats(measured.p99_kl)}) nats", note),
        Measured("top-1 agreement as shipped", f"{measured.top1:.1%}", note),
        Measured("perplexity", ppl, "this file, short windows: compare only with rows like this"),
        Measured("perplexity, fp32", reference, "the checkpoint, same windows"),
        *(_slice_row(label, part) for label, part in measured.by_domain.items()),
        *(_slice_row(f"positions {label}", part) for label, part in measured.by_position.items()),
    ]


def _slice_row(label: str, part: Slice) -> Measured:
    losses = f"KL {nats(part.mean_kl)} ({nats(part.p99_kl)}), top-1 {part.top1:.1%}"
    note = f"as shipped, {part.positions:,} positions, perplexity of fp32 {perplexity(part.reference_perplexity)}"
    return Measured(label, f"{losses}, perplexity {perplexity(part.perplexity)}", note)


def _quantization_rows(measured: Comparison) -> list[Measured]:
    return [
        Measured("KL of quantization, mean", f"{nats(measured.mean_kl)} nats", "fp32 → quantized PyTorch model"),
        Measured("top-1 of quantization", f"{measured.top1:.1%}", "fp32 → quantized PyTorch model"),
    ]


def _lowering_rows(measured: Comparison, record: Record) -> list[Measured]:
    note = f"quantized PyTorch model → this file, {measured.positions} positions, {record.accuracy.decode} decode steps"
    return [
        Measured("KL of lowering, mean (p99)", f"{measured.mean_kl:.2e} ({measured.p99_kl:.2e}) nats", note),
        Measured("top-1 of lowering", f"{measured.top1:.1%}", note),
        Measured("logit SQNR of lowering", f"{measured.sqnr_db:.1f} dB", note),
    ]


def _cache_rows(measured: Comparison) -> list[Measured]:
    note = "quantized PyTorch model with a float32 cache → this file, the last {:,} positions up to there"
    return [
        Measured(f"KL at {place}", f"{nats(part.mean_kl)} nats, top-1 {part.top1:.1%}", note.format(part.positions))
        for place, part in measured.by_position.items()
    ]


def _speed_rows(measured: Latency) -> list[Measured]:
    rows = []
    for test in measured.tests:
        label = f"prefill, {test.n_prompt} tokens" if test.n_prompt else f"decode, {test.n_gen} tokens"
        note = f"{len(test.samples_ns)} repeats, {measured.n_threads} threads"
        rows.append(Measured(label, f"{test.avg_ts:.1f} ± {test.stddev_ts:.1f} tokens/s", note))
    shortest = measured.tests[0].n_prompt
    rows.append(Measured("time to first token", f"{measured.ttft_p50_s * 1e3:.0f} ms", f"{shortest}-token prompt, p50"))
    rows.append(Measured("load", f"{measured.load_s:.2f} s", f"first prompt {measured.first_inference_s * 1e3:.0f} ms"))
    rows.append(Measured("peak memory", f"{measured.peak_rss_bytes / 1e6:.0f} MB", "whole process"))
    return rows
