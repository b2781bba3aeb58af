"""Several targets of one model and recipe side by side: one `python -m export` for each. Knows no formats.

Nothing has to arrange that they quantize once: the first one to come has the cache's lock, the others import their
libraries meanwhile, wait for it there and find its result.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

from . import checkpoint, disk, interrupt, memory, preflight
from .errors import ExportError
from .plan import Plan
from .preflight import Estimate
from .progress import console
from .relayed import Relayed


def build(plans: Sequence[Plan], source: str | None, place: Path, cache: Path) -> None:
    """Build plans that differ in their target only into `place`, the largest first.

    One that fails lets the others end. Raises ExportError: too little disk for all of them, before any starts; or
    which targets failed, and why.
    """
    architecture = plans[0].quant.reshaped(checkpoint.architecture_of(plans[0].model, source))
    wanted = {plan.target.name: preflight.estimate(plan, source, architecture, cache) for plan in plans}
    room, workers = memory.free().bytes, cores()
    needed = preflight.disk_line(list(wanted.values()), place, cache)
    console.print(
        f"  {len(plans)} targets need {needed}; as many at once as fit in {disk.size(room)} memory on {workers} cores",
        soft_wrap=True,
    )
    preflight.require_disk(list(wanted.values()), place, cache)
    waiting = sorted(plans, key=lambda plan: wanted[plan.target.name].memory_bytes, reverse=True)
    failures = work(waiting, source, Fit(wanted, room, workers))
    if failures:
        reasons = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise ExportError(f"{len(failures)} of {len(plans)} targets failed: {reasons}")


class Fit:
    """Who may run beside whom. A single one always may: it refuses itself when there is too little memory."""

    def __init__(self, wanted: dict[str, Estimate], memory_bytes: int, workers: int) -> None:
        self._wanted = wanted
        self._memory_bytes, self._workers = memory_bytes, workers

    def beside(self, name: str, running: Sequence[str]) -> bool:
        """Whether one more may start: what all of them take at their peaks fits, and there is a core for each."""
        taken = sum(self._wanted[one].memory_bytes for one in (name, *running))
        return not running or (len(running) < self._workers and taken <= self._memory_bytes)


def work(waiting: list[Plan], source: str | None, fit: Fit) -> dict[str, str]:
    """Run all to their ends; target → why it failed. Whatever interrupts this stops every child and waits for it."""
    width = max(len(plan.target.name) for plan in waiting)
    running: dict[str, Relayed] = {}
    ended: SimpleQueue[Relayed] = SimpleQueue()
    failures: dict[str, str] = {}
    try:
        while waiting or running:
            while plan := next((plan for plan in waiting if fit.beside(plan.target.name, list(running))), None):
                waiting.remove(plan)
                name = plan.target.name
                with interrupt.held():
                    running[name] = Relayed(name, f"{name:<{width}} |", command(plan, source), ended.put)
            child = ended.get()
            del running[child.name]
            if failure := child.failure:
                failures[child.name] = failure
    finally:
        for child in running.values():
            child.stop()
        for child in running.values():
            child.wait_for_end()
    return failures


def command(plan: Plan, source: str | None) -> list[str]:
    """The build of one target."""
    words = [sys.executable, "-m", "export", plan.model.name, plan.quant.name, plan.target.name]
    return words if source is None else [*words, f"--source={source}"]


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
