"""Several targets of one model and recipe side by side: one `python -m export` for each.

They quantize once without being told to: the first takes the cache's lock, the others import their libraries meanwhile,
wait for the lock and find the result.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from export import checkpoints
from export.checkpoints.origin import Origin
from export.errors import ExportError
from export.host import disk, interrupt, memory, processes, processor
from export.host.console import console
from export.host.processes import BackgroundProcess
from export.plan import Plan

from . import needs, request
from .needs import Estimate


def build(plans: Sequence[Plan], source: Origin | None, folder: Path, cache: Path, options: Sequence[str] = ()) -> None:
    """Build plans that differ in their target only into `folder`, the largest first, with these options of the command.

    A failure does not stop the others. Raises ExportError: too little disk for all of them, before any starts; or
    which targets failed, and why.
    """
    architecture = plans[0].quant.reshaped(checkpoints.architecture_of(plans[0].model, source))
    estimates = {plan.target.name: needs.estimate(plan, source, architecture, cache) for plan in plans}
    room, workers = memory.free().bytes, processor.usable()
    needed = needs.disk_line(list(estimates.values()), folder, cache)
    console.print(
        f"  {len(plans)} targets need {needed}; as many at once as fit in {disk.size(room)} memory on {workers} cores",
        soft_wrap=True,
    )
    needs.require_disk(list(estimates.values()), folder, cache)
    waiting = sorted(plans, key=lambda plan: estimates[plan.target.name].memory_bytes, reverse=True)
    failures = work(waiting, source, folder, Fit(estimates, room, workers), options)
    if failures:
        reasons = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise ExportError(f"{len(failures)} of {len(plans)} targets failed: {reasons}")


class Fit:
    """Which builds may run beside each other. A single one always may: it refuses itself where memory is too little."""

    def __init__(self, estimates: dict[str, Estimate], memory_bytes: int, workers: int) -> None:
        self._estimates, self._memory_bytes, self._workers = estimates, memory_bytes, workers

    def beside(self, name: str, running: Sequence[str]) -> bool:
        """Whether one more may start: the peaks of all of them together fit, and there is a core for each."""
        taken = sum(self._estimates[target].memory_bytes for target in (name, *running))
        return not running or (len(running) < self._workers and taken <= self._memory_bytes)


def work(
    waiting: list[Plan], source: Origin | None, folder: Path, fit: Fit, options: Sequence[str] = ()
) -> dict[str, str]:
    """Run all to their ends; give target → why it failed. An interruption stops every child and waits for it."""
    width = max(len(plan.target.name) for plan in waiting)
    running: dict[str, BackgroundProcess] = {}
    ended: SimpleQueue[BackgroundProcess] = SimpleQueue()
    failures: dict[str, str] = {}
    try:
        while waiting or running:
            while plan := next((plan for plan in waiting if fit.beside(plan.target.name, list(running))), None):
                waiting.remove(plan)
                name = plan.target.name
                with interrupt.held():
                    show = partial(console.print, f"{name:<{width}} |", soft_wrap=True)
                    running[name] = BackgroundProcess(name, [*command(plan, source, folder), *options], show, ended.put)
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


def command(plan: Plan, source: Origin | None, folder: Path) -> list[str]:
    """Command line of the build of one target into its folder below `folder`."""
    _, _, *words = request.words(plan, *request.options(source))
    return [*processes.python("export"), *words, "--out", str(folder / plan.id)]
