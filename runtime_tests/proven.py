"""What was proven already, by the same code on the same machine, need not be proven again. Measures nothing."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from devices import Device
from export import manifest
from export.manifest import ROOT, Manifest
from export.progress import console

from . import baseline, environment
from . import record as records_file
from .evaluation import TEXT, Evaluation
from .record import Environment

CODE = ("runtime_tests/**/*.py", "runtime_tests/runner/*", "devices/*.py", "export/**/*.py")


def key(folder: Path, device: Device, evaluation: Evaluation, machine: Environment) -> str:
    """sha256 over everything that decides a verdict, but how busy the machine is."""
    kept = baseline.place(device.name, machine)
    inputs = {
        "manifest": manifest.digest(folder),
        "device": device.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "texts": [digest(TEXT / text.file) for text in evaluation.texts],
        "baseline": digest(kept) if kept.is_file() else None,
        "machine": [machine.cpu, machine.cores, machine.memory_bytes, machine.os, machine.python, machine.tools],
        "code": [digest(path) for pattern in CODE for path in sorted(ROOT.glob(pattern)) if path.is_file()],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """sha256 of a file."""
    return manifest.file_info(path).sha256


def without(
    cases: Sequence[tuple[Path, Manifest]], device: Device, evaluation: Evaluation, records: Path
) -> list[tuple[Path, Manifest]]:
    """The artifacts that must be proven; those that hold already are named with their verdict."""
    machine, left = environment.current(), []
    for folder, described in cases:
        found = records_file.newest_of(records, manifest.digest(folder))
        if found is None or not found.holds or found.proof != key(folder, device, evaluation, machine):
            left.append((folder, described))
            continue
        manifest.verify_files(folder, described)
        console.print(f"{folder}: {found.outcome.value} on {found.started_at}, nothing changed since", soft_wrap=True)
    return left
