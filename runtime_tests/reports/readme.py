"""python -m runtime_tests.reports.readme: the results table of README.md, from the records of its own main job."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

import devices
from export import manifest
from export.build.command import run
from export.errors import ExportError
from export.host.text import code
from export.host.text import markdown as escaped
from export.toolbox.tables import NONE, markdown
from runtime_tests.evidence import record as records_file
from runtime_tests.evidence.record import Record

_RECORDS, _README = Path("build/records/records.jsonl"), Path("README.md")
_START, _END = "<!-- results: written by `make readme` -->", "<!-- end of results -->"
_NAMED = re.compile(r"^\| `([\w.-]+)` \| `model\.", re.MULTILINE)
"""The folders that the page says `make` writes."""
_HEADER = (
    *("artifact", "size", "KL as shipped", "top-1", "KL of quantization", "KL of lowering"),
    *("prefill", "decode", "peak memory", "verdict"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Rewrite the block between the two markers."""
    text = _README.read_text(encoding="utf-8")
    if _START not in text or _END not in text:
        raise ExportError(f"{_README}: the markers of the results block are missing")
    before, after = text.split(_START)[0], text.split(_END)[1]
    records = _main_job(_NAMED.findall(before + after))
    _README.write_text(f"{before}{_START}\n\n{block(records)}\n\n{_END}{after}", encoding="utf-8")


def _main_job(artifacts: Sequence[str]) -> list[Record]:
    """The last run on this machine, if it is one of these artifacts at this commit. Raises ExportError."""
    records = records_file.newest_run(_RECORDS, "host")
    commit, usual = manifest.source_info().commit, devices.load("host").evaluation
    problem = "no records" if not records else ""
    for one in records:
        if {record.artifact for record in records} != set(artifacts):
            problem = f"the last run is of {', '.join(record.artifact for record in records)}"
        elif one.commit != commit or one.dirty:
            problem = f"the last run is of commit {one.commit[:12]}{' with local changes' if one.dirty else ''}"
        elif one.accuracy.evaluation != usual:
            problem = f"the last run is of --eval {one.accuracy.evaluation}"
    if problem:
        raise ExportError(
            f"{_RECORDS}: {problem}; {_README} shows {', '.join(artifacts)} at commit {commit[:12]}: run `make`, of a "
            "clean checkout and without variables, first"
        )
    return records


def block(records: Sequence[Record]) -> str:
    """The table, then the machine, the commit and the meaning of its numbers."""
    newest = records[-1]
    machine, dirty = newest.environment, " with local changes" if newest.dirty else ""
    system = escaped(machine.os)
    versions = ", ".join(
        escaped(f"{tool} {machine.tools.get(tool, 'unknown')}")
        for tool in ("torch", "executorch", "coremltools", "onnxruntime")
    )
    lines = [markdown([_HEADER, *map(_row, records)]), ""]
    positions = newest.accuracy.lowering.positions if newest.accuracy.lowering else 0
    lines += [
        f"Measured by `make validate` on {escaped(machine.cpu)}, {machine.cores} cores (shared), {system}; "
        f"{versions}; commit {code(newest.commit[:12])}{dirty}, {escaped(newest.started_at[:10])}. "
        f"KL in nats over {positions} positions "
        f"({newest.accuracy.prefill} prefill + {newest.accuracy.decode} decode steps a window), as shipped: fp32 in "
        f"Transformers to the file, top-1 likewise; prefill of "
        f"{_longest_prompt(records)} tokens and decode in tokens/s, mean of 5. Where the runtime rounds activations to "
        "int8, the number in brackets is the KL that float noise of one ulp alone makes of the same model.",
    ]
    return "\n".join(lines)


def _row(record: Record) -> list[str]:
    measured, speed = record.accuracy, record.latency
    total, quantization, lowering, noise = measured.total, measured.quantization, measured.lowering, measured.noise
    floor = f" ({noise.mean_kl:.1e})" if noise else ""
    return [
        code(record.artifact),
        f"{record.size_bytes / 1e6:.1f} MB",
        f"{total.mean_kl:.3f}" if total else NONE,
        f"{total.top1:.1%}" if total else NONE,
        f"{quantization.mean_kl:.3f}" if quantization else NONE,
        f"{lowering.mean_kl:.1e}{floor}" if lowering else NONE,
        f"{speed.tests[-2].avg_ts:.0f}" if speed else "not timed",
        f"{speed.tests[-1].avg_ts:.0f}" if speed else "not timed",
        f"{speed.peak_rss_bytes / 1e6:.0f} MB" if speed else NONE,
        record.outcome.value,
    ]


def _longest_prompt(records: Sequence[Record]) -> int:
    return max((test.n_prompt for r in records if r.latency for test in r.latency.tests), default=0)


if __name__ == "__main__":
    sys.exit(run(app))
