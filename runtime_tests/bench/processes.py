"""A stock tool or an export as a child process, offline, with its output in a log file."""

import time
from pathlib import Path

from export.host.console import console
from export.host.processes import Exit
from export.host.processes import run as run_child
from export.manifest import ROOT

_PROGRESS_EVERY_S = 60.0
OFFLINE = ("env", "HF_HUB_OFFLINE=1", "TOKENIZERS_PARALLELISM=false")
"""No tool may fetch weights: each is given those that ours gets."""


def run(command: tuple[str, ...], log: Path, label: str) -> Exit:
    """Run from the checkout's root, with a line each minute; the child is killed when this process is interrupted."""
    started = printed = time.monotonic()

    def watch(_: str) -> bool:
        nonlocal printed
        if (now := time.monotonic()) - printed > _PROGRESS_EVERY_S:
            printed = now
            console.print(f"  {label}: {(now - started) / 60:.0f} min", soft_wrap=True)
        return False

    with log.open("w+b") as file:
        return run_child([*OFFLINE, *command], cwd=ROOT, watch=watch, log=file)
