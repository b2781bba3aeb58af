"""python -m runtime_tests.readme: the results table of README.md, from the last validation run's records."""

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from export.cli import run
from export.errors import ExportError

from . import record
from .record import Record

RECORDS, README = Path("build/records/records.jsonl"), Path("README.md")
START, END = "<!-- results: written by `make readme` -->", "<!-- end of results -->"
HEADER = (
    "| artifact | size | KL as shipped | top-1 | KL of quantization | KL of lowering | prefill | decode | peak memory "
    "| verdict |"
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Rewrite the block between the two markers."""
    text = README.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ExportError(f"{README}: the markers of the results block are missing")
    before, after = text.split(START)[0], text.split(END)[1]
    README.write_text(f"{before}{START}\n\n{block(last_run())}\n\n{END}{after}", encoding="utf-8")


def last_run() -> list[Record]:
    """Records of the newest run on this machine."""
    records = record.newest_run(RECORDS, "host")
    if not records:
        raise ExportError(f"{RECORDS}: no records; run `make` first")
    return records


def block(records: Sequence[Record]) -> str:
    """Table, and what its numbers belong to."""
    newest = records[-1]
    machine, dirty = newest.environment, " with local changes" if newest.dirty else ""
    versions = ", ".join(
        f"{tool} {machine.tools[tool]}" for tool in ("torch", "executorch", "coremltools", "onnxruntime")
    )
    lines = [HEADER, "|---" * HEADER.count(" | ") + "|---|", *(row(one) for one in records), ""]
    positions = newest.accuracy.lowering.positions if newest.accuracy.lowering else 0
    lines += [
        f"Measured by `make validate` on {machine.cpu}, {machine.cores} cores (shared), {machine.os}; {versions}; "
        f"commit `{newest.commit[:12]}`{dirty}, {newest.started_at[:10]}. KL in nats over {positions} positions "
        f"({newest.accuracy.prefill} prefill + {newest.accuracy.decode} decode steps a window), as shipped: fp32 in "
        f"Transformers to the file, top-1 likewise; prefill of "
        f"{longest_prompt(records)} tokens and decode in tokens/s, mean of 5. Where the runtime rounds activations to "
        "int8, the number in brackets is the KL that float noise of one ulp alone makes of the same model.",
    ]
    return "\n".join(lines)


def row(one: Record) -> str:
    """One artifact."""
    measured, speed = one.accuracy, one.latency
    total, quantization, lowering, noise = measured.total, measured.quantization, measured.lowering, measured.noise
    floor = f" ({noise.mean_kl:.1e})" if noise else ""
    cells = [
        f"`{one.artifact}`",
        f"{one.size_bytes / 1e6:.1f} MB",
        f"{total.mean_kl:.3f}" if total else "–",
        f"{total.top1:.1%}" if total else "–",
        f"{quantization.mean_kl:.3f}" if quantization else "–",
        f"{lowering.mean_kl:.1e}{floor}" if lowering else "–",
        f"{speed.tests[-2].avg_ts:.0f}" if speed else "not timed",
        f"{speed.tests[-1].avg_ts:.0f}" if speed else "not timed",
        f"{speed.peak_rss_bytes / 1e6:.0f} MB" if speed else "–",
        one.outcome.value,
    ]
    return f"| {' | '.join(cells)} |"


def longest_prompt(records: Sequence[Record]) -> int:
    """Tokens of the longest timed prompt."""
    return max((test.n_prompt for one in records if one.latency for test in one.latency.tests), default=0)


if __name__ == "__main__":
    sys.exit(run(app))
