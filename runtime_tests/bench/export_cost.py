"""What exporting costs: whole processes, cold, with their peak memory; the stock ones as noted when they ran."""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from export.errors import ExportError
from export.manifest import ROOT
from export.plan import Plan, load_plan
from export.progress import stage

from . import processes
from .contenders import export_command
from .results import ExportCost
from .stock import BENCH, LOG, Made

TARGETS = ("executorch-xnnpack", "coreml", "onnx-cpu")
COLD = "runtime_tests.bench.cold_export"
EXPORTERS = {
    "export_llm": "ExecuTorch export_llm",
    "genai": "onnxruntime-genai builder",
    "genai-head8": "onnxruntime-genai builder, int8 head",
    "llamacpp-q4_0": "llama.cpp quantize, Q4_0",
    "llamacpp-q4_k_m": "llama.cpp quantize, Q4_K_M",
    "llamacpp-q8_0": "llama.cpp quantize, Q8_0",
}


def ours(model: str, quant: str, source: str | None) -> list[ExportCost]:
    """Each target once, from the checkpoint, with an empty quantization cache."""
    return [cold(load_plan(model, quant, target), source) for target in TARGETS]


def cold(plan: Plan, source: str | None) -> ExportCost:
    """One export in a process of its own, into a folder that is thrown away."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix=".cold-", dir=ROOT / BENCH) as scratch, stage("export", plan.id):
        command = export_command(plan, Path(scratch) / "artifact", source, COLD)
        done = processes.run((sys.executable, *command), Path(scratch) / LOG, plan.id)
    if done.returncode != 0:
        raise ExportError(f"{plan.id}: export failed: {done.last_words}")
    return ExportCost(
        label=f"python -m export, {plan.target.name}",
        command=f"python -m export {plan.model.name} {plan.quant.name} {plan.target.name}",
        seconds=done.seconds,
        peak_rss_bytes=done.peak_rss_bytes,
        load_average_1min=round(load, 2),
    )


def stock(made: Mapping[str, Made]) -> list[ExportCost]:
    """The stock exporters, as measured when their artifacts were made."""
    return [
        ExportCost(
            label=EXPORTERS[name],
            command=one.command,
            seconds=one.seconds,
            peak_rss_bytes=one.peak_rss_bytes,
            load_average_1min=one.load_average_1min,
        )
        for name, one in made.items()
    ]
