"""Run a command to its end and say what it cost: seconds and peak memory. Knows nothing about what it runs."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from export.manifest import ROOT
from export.progress import console

from ..isolation import last_line

PROGRESS_EVERY_S = 60.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""No stock tool may fetch weights: it is given ours."""


@dataclass(frozen=True)
class Finished:
    """A process that ended."""

    returncode: int
    seconds: float
    peak_rss_bytes: int
    """Of the process itself or the largest one it started; never less than ours when it was started."""
    last_words: str


def run(command: tuple[str, ...], log: Path, label: str) -> Finished:
    """Run from the checkout's root, output into a log file, with a line each minute; killed if we are."""
    with log.open("wb") as file:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, env=os.environ | OFFLINE
        )
        try:
            status, peak_kib = wait(child.pid, label)
        except BaseException:
            child.kill()
            child.wait()
            raise
    child.returncode = os.waitstatus_to_exitcode(status)  # collected here, so that Popen does not wait again
    words = last_line(log.read_text(encoding="utf-8", errors="replace")[-4096:])
    return Finished(child.returncode, time.perf_counter() - started, peak_kib * 1024, words[-300:])


def wait(pid: int, label: str) -> tuple[int, int]:
    """Wait status and peak memory (KiB) of a child; says now and then that it still runs."""
    started = said = time.monotonic()
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage.ru_maxrss
        time.sleep(0.05)
        if (now := time.monotonic()) - said > PROGRESS_EVERY_S:
            said = now
            console.print(f"  {label}: {(now - started) / 60:.0f} min", soft_wrap=True)
