"""Calls of a Core ML package in every shape and state that clients use, in a child process: `check` compares them."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export import manifest
from export.manifest import Manifest
from runtime_tests.checks import accuracy
from runtime_tests.jobs import CoreMLJob, report_progress
from runtime_tests.sessions import mlpackage
from runtime_tests.sessions.footprint import peak_bytes

LENGTHS = (1, 2, 5, 64, 512)
"""New tokens of calls that follow each other in one state, so that the slots in use grow beyond them."""
CONTEXT = 1024
"""Slots: enough for all of them and the steps."""
STATES, MASK = "two states in turns", "mask [1, 1, 1, e + 1]"
_TURNS = 8
_Logits = NDArray[np.float16]


class _Caller:
    """A loaded package by the names of its contract, and the nanoseconds of each call."""

    def __init__(self, model: Any, described: Manifest) -> None:
        self.model = model
        self.ids, self.mask = (spec.name for spec in described.contract.inputs)
        self.output = described.contract.outputs[0].name
        self.times: list[int] = []

    def __call__(self, state: Any, tokens: Sequence[int], mask: NDArray[np.float32]) -> _Logits:
        """Logits [q, V]: fp16 numbers, in whatever type the runtime gives them."""
        started = time.perf_counter_ns()
        outputs = self.model.predict({self.ids: np.array([tokens], np.int32), self.mask: mask}, state=state)
        self.times.append(time.perf_counter_ns() - started)
        logits: _Logits = np.asarray(outputs[self.output][0], np.float16)
        return logits


def answer(job: CoreMLJob) -> dict[str, Any]:
    """Make the calls, in Core ML on the job's units or in the evaluator.

    `compared`: name of a kind of call → mean KL in nats and SQNR in dB. Raises whatever the runtime raises.
    """
    folder = Path(job.folder)
    described = manifest.read(folder)
    package, before, started = folder / described.plan.target.artifact, peak_bytes(), time.perf_counter_ns()
    if job.compute_units is None or not mlpackage.in_core_ml():
        model: Any = mlpackage.Evaluated(package, job.threads)
    else:
        model = mlpackage.loaded(package, job.compute_units, mlpackage.cache_here())
    load_ns = time.perf_counter_ns() - started
    caller = _Caller(model, described)
    logits = _answers(caller, described.architecture.vocab_size, job.steps)
    if job.compute_units is None:
        np.savez(job.reference, **logits)  # type: ignore[arg-type]  # its other parameters are of other types
    return {
        "load_ms": load_ns / 1e6,
        "step_ms": median(caller.times[len(LENGTHS) : len(LENGTHS) + job.steps]) / 1e6,
        "memory_bytes": peak_bytes() - before,
        "compared": _compared(logits, Path(job.reference)),
    }


def _answers(call: _Caller, vocab_size: int, steps: int) -> dict[str, _Logits]:
    tokens = np.random.default_rng(1).integers(vocab_size, size=CONTEXT).tolist()
    model, past, logits = call.model, 0, {}
    state = model.make_state()

    def fed(length: int) -> _Logits:
        nonlocal past
        past += length
        report_progress(past, sum(LENGTHS) + steps)
        return call(state, tokens[past - length : past], mlpackage.causal_mask(past - length, length))

    for length in LENGTHS:
        logits[f"q = {length}"] = fed(length)
    logits[f"{steps} steps"] = np.concatenate([fed(1) for _ in range(steps)])
    states = model.make_state(), model.make_state()
    turns = [(turn, side) for turn in range(_TURNS) for side in (0, 1)]
    logits[STATES] = np.concatenate(
        [call(states[side], [tokens[2 * turn + side]], mlpackage.causal_mask(turn, 1)) for turn, side in turns]
    )
    state, ends = model.make_state(), (5, *range(6, 6 + _TURNS))
    logits[MASK] = np.concatenate(
        [
            call(state, tokens[first:end], np.zeros((1, 1, 1, end + 1), np.float32))
            for first, end in zip((0, *ends), ends, strict=False)
        ]
    )
    return logits


def _compared(logits: dict[str, _Logits], reference: Path) -> dict[str, tuple[float, float]]:
    compared = {}
    with np.load(reference) as kept:
        for name, rows in logits.items():
            expected = kept[name].astype(np.float32)
            kl = accuracy.kl_divergence(*map(accuracy.log_softmax, (expected, rows.astype(np.float32))))
            sqnr = accuracy.sqnr_by_window(expected[None], rows[None].astype(np.float32))[0]
            compared[name] = (float(kl.mean()), sqnr)
    return compared
