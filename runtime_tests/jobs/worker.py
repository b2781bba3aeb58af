"""The child process of `isolation`: reads jobs as lines of JSON from stdin, prints one line of JSON after each.

    echo '{"action": "bandwidth", "threads": 2}' | python -m runtime_tests.jobs.worker

A native runtime may end this process at any point; the parent makes that an outcome.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from export import manifest
from export.build.command import quiet_libraries
from export.errors import ExportError
from export.host import disk, memory, processes, processor
from runtime_tests import jobs
from runtime_tests.evidence.record import Outcome
from runtime_tests.sessions import Session, greedy, open_session

from . import logits_file
from .isolation import DISK_FULL


class LoadError(Exception):
    """The artifact does not load."""


def _run(job: jobs.Job) -> dict[str, Any]:  # noqa: C901, PLR0911, PLR0912 – one line per kind of job
    """Run a job; the modules that need torch are imported by the jobs that need them."""
    match job:
        case jobs.LogitsJob():
            return _write_logits(job)
        case jobs.GenerateJob():
            return {"tokens": greedy(opened(job.folder, job.threads), job.prompt, job.count)}
        case jobs.ConformanceJob():
            from runtime_tests.checks.conformance import check

            contract = manifest.read(Path(job.folder)).contract
            return {"failures": check(opened(job.folder, job.threads), contract.kv.context_length, fill=job.fill)}
        case jobs.SpeedJob():
            from runtime_tests.checks.latency import measure

            return measure(job)
        case jobs.BandwidthJob():
            from runtime_tests.checks.latency import read_bandwidth

            return {"bytes_per_s": read_bandwidth(job.threads)}
        case jobs.WeightsJob():
            from runtime_tests.checks.weights import compare

            return compare(job)
        case jobs.ReferenceJob():
            from runtime_tests.reference import compute

            return compute(job)
        case jobs.TraceJob():
            from runtime_tests.sessions.trace.run import compute as compute_trace

            return compute_trace(job)
        case jobs.BenchJob():
            from runtime_tests.bench.runners import measure as measure_contender

            return measure_contender(job)
        case jobs.DepthsJob():
            from runtime_tests.bench.runners import measure_depths

            return measure_depths(job)
        case jobs.OverheadJob():
            from runtime_tests.bench.runners import measure_overhead

            return measure_overhead(job)
        case jobs.BenchLogitsJob():
            from runtime_tests.bench.runners import write_logits as write_contender_logits

            return write_contender_logits(job)
        case jobs.CoreMLJob():
            from runtime_tests.coreml.calls import answer as answer_calls

            return answer_calls(job)
        case jobs.CoreMLPlanJob():
            from runtime_tests.coreml.compute_plan import placements

            placed = placements(Path(job.package), job.compute_units)
            return {"placed": [[device, operator, number] for (device, operator), number in placed.items()]}
        case jobs.TaskDataJob():
            from runtime_tests.tasks.run import count_questions

            return count_questions(job)
        case jobs.TasksJob():
            from runtime_tests.tasks.run import evaluate_here

            return evaluate_here(job)


def opened(folder: str, threads: int) -> Session:
    """The artifact's session. Raises LoadError for any error of its runtime."""
    path = Path(folder)
    described = manifest.read(path)
    try:
        return open_session(path, described, threads=threads)
    except Exception as error:
        raise LoadError(_one_line(error)) from error


def _write_logits(job: jobs.LogitsJob) -> dict[str, Any]:
    """Prefill each window, then feed its other tokens one by one, as many windows at once as the session takes."""
    vocab = manifest.read(Path(job.folder)).architecture.vocab_size
    session = opened(job.folder, job.threads)
    loaded = [np.load(task.tokens) for task in job.tasks]
    done, total = (
        0,
        sum(len(tokens) * (tokens.shape[1] - task.prefill) for task, tokens in zip(job.tasks, loaded, strict=True)),
    )
    for task, tokens in zip(job.tasks, loaded, strict=True):
        shape = len(tokens), tokens.shape[1] - task.prefill, vocab
        with logits_file.writing(task.out, shape) as write:
            for first in range(0, len(tokens), session.abreast):
                windows, rows = tokens[first : first + session.abreast].tolist(), []
                for logits in session.feed_windows(windows, task.prefill):
                    rows.append(logits)
                    done += len(windows)
                    jobs.report_progress(done, total)
                write(np.stack(rows, axis=1))
    measures_speed = session.measures_speed
    session.close()
    return {"tasks": len(job.tasks), "measures_speed": measures_speed}


def _one_line(error: BaseException) -> str:
    """An exception as one line, with its type where the message may not explain itself."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ExportError) else f"{type(error).__name__}: {text}"[:500]


def answer(job: jobs.Job) -> dict[str, Any]:
    """Run a job. This is the one place that catches every exception: an error is an answer here."""
    try:
        return {"result": _run(job)}
    except LoadError as error:
        return {"failed": Outcome.LOAD_FAIL.value, "error": str(error)}
    except jobs.SourceError as error:
        return {"failed": error.outcome.value, "error": str(error)}
    except Exception as error:
        if disk.is_full(error):
            return {"failed": DISK_FULL, "error": _one_line(error)}
        return {"failed": Outcome.RUN_FAIL.value, "error": _one_line(error)}


def main() -> int:
    """Read jobs, run them, print the answers; the exit status is that of the last."""
    processes.end_with_parent()
    reply: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        reply = _reply(jobs.AnyJob.model_validate_json(line).root)
        print("\n" + json.dumps(reply), flush=True)
        memory.give_back()
    return 0 if "result" in reply else 1


def _reply(job: jobs.Job) -> dict[str, Any]:
    if not isinstance(job, jobs.TaskDataJob | jobs.TasksJob):  # these may read data sets of the hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not isinstance(job, jobs.Timed):  # another artifact's job may run beside it: threads wait asleep
        processes.wait_asleep()
    processor.limit_threads()
    quiet_libraries()
    return answer(job)


if __name__ == "__main__":
    sys.exit(main())
