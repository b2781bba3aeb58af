"""Exports of ours in child processes: the artifacts that are benchmarked, and the cost of a cold export.

python -m runtime_tests.bench.exports MODEL QUANT TARGET --out FOLDER    with an empty quantization cache
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from export import manifest
from export.errors import ExportError
from export.host.console import console, stage
from export.manifest import ROOT
from export.plan import Plan, load_plan, names

from . import processes
from .results import ExportCost
from .stock import BENCH, LOG, Made

_EXPORTERS = {
    "export_llm": "ExecuTorch export_llm",
    "genai": "onnxruntime-genai builder",
    "genai-head8": "onnxruntime-genai builder, int8 head",
    "llamacpp-q4_0": "llama.cpp quantize, Q4_0",
    "llamacpp-q4_k_m": "llama.cpp quantize, Q4_K_M",
    "llamacpp-q8_0": "llama.cpp quantize, Q8_0",
}


class NotBuiltError(ExportError):
    """Our exporter refuses a plan."""


def built(plan: Plan, source: str | None) -> Path:
    """The folder of a plan's artifact, relative to the checkout; built unless the code as it is now has built it."""
    folder = BENCH / "ours" / plan.id
    if _is_fresh(folder, plan, source):
        return folder
    console.print(f"  building {folder}", soft_wrap=True)
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    (ROOT / folder).parent.mkdir(parents=True, exist_ok=True)
    done = processes.run(_command("export", plan, folder, source), ROOT / f"{folder}.{LOG}", plan.id)
    if done.returncode != 0:
        raise NotBuiltError(f"{plan.id}: export failed: {done.last_words}")
    return folder


def ours(model: str, quant: str, source: str | None) -> list[ExportCost]:
    """Every target once, from the checkpoint, with an empty quantization cache."""
    return [_cold(load_plan(model, quant, target), source) for target in names("targets")]


def stock(made: Mapping[str, Made]) -> list[ExportCost]:
    """Costs of the stock exporters, measured when their artifacts were made."""
    return [
        ExportCost(
            label=_EXPORTERS[name],
            command=artifact.command,
            seconds=artifact.seconds,
            peak_rss_bytes=artifact.peak_rss_bytes,
            load_average_1min=artifact.load_average_1min,
        )
        for name, artifact in made.items()
    ]


def _cold(plan: Plan, source: str | None) -> ExportCost:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix=".cold-", dir=ROOT / BENCH) as scratch, stage("export", plan.id):
        command = _command("runtime_tests.bench.exports", plan, Path(scratch) / "artifact", source)
        done = processes.run(command, Path(scratch) / LOG, plan.id)
    if done.returncode != 0:
        raise ExportError(f"{plan.id}: export failed: {done.last_words}")
    return ExportCost(
        label=f"python -m export, {plan.target.name}",
        command=f"python -m export {plan.model.name} {plan.quant.name} {plan.target.name}",
        seconds=done.seconds,
        peak_rss_bytes=done.peak_rss_bytes,
        load_average_1min=round(load, 2),
    )


def _command(module: str, plan: Plan, folder: Path, source: str | None) -> tuple[str, ...]:
    names_of_plan = (plan.model.name, plan.quant.name, plan.target.name)
    origin = ("--source", source) if source else ()
    return (sys.executable, "-m", module, *names_of_plan, "--out", str(folder), *origin)


def _is_fresh(folder: Path, plan: Plan, source: str | None) -> bool:
    """Whether a folder holds the plan as the code and configuration of this checkout make it."""
    try:
        described = manifest.read(ROOT / folder)
    except ExportError:
        return False
    same = described.plan == plan and described.checkpoint.origin == (source or plan.model.source)
    return same and described.source.sha256 == manifest.source_info().sha256


def _export_cold() -> int:
    """`python -m export` with an empty cache, so that nothing comes from an earlier build."""
    from export import pipeline
    from export.__main__ import app
    from export.build.command import run

    with tempfile.TemporaryDirectory() as cache:
        pipeline.CACHE = Path(cache)
        return run(app)


if __name__ == "__main__":
    sys.exit(_export_cold())
