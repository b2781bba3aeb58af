"""The child process of `isolation`: one job as JSON on stdin, one JSON object as the last line of stdout.

    echo '{"action": "bandwidth", "threads": 2}' | python -m runtime_tests.worker

A native runtime may end this process at any point; the parent makes an outcome of that.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from export import disk, manifest
from export.cli import quiet_libraries
from export.errors import ExportError

from . import jobs, logits_file, orphan
from .generate import greedy
from .isolation import DISK_FULL
from .record import Outcome
from .session import Session, open_session


class LoadError(Exception):
    """The artifact does not load."""


def perform(job: jobs.Job) -> dict[str, Any]:  # noqa: C901, PLR0911 – one line per kind of job
    """Do a job; the modules that need torch are imported by the jobs that need them."""
    match job:
        case jobs.LogitsJob():
            return write_logits(job)
        case jobs.GenerateJob():
            return {"tokens": greedy(opened(job.folder, job.threads), job.prompt, job.count)}
        case jobs.ConformanceJob():
            from .conformance import check

            contract = manifest.read(Path(job.folder)).contract
            return {"failures": check(opened(job.folder, job.threads), contract.kv.context_length, fill=job.fill)}
        case jobs.SpeedJob():
            from .latency import measure

            return measure(job)
        case jobs.BandwidthJob():
            from .latency import read_bandwidth

            return {"bytes_per_s": read_bandwidth(job.threads)}
        case jobs.WeightsJob():
            from .weights import compare

            return compare(job)
        case jobs.ReferenceJob():
            from .reference import compute

            return compute(job)
        case jobs.BenchJob():
            from .bench.child import measure as measure_contender

            return measure_contender(job)
        case jobs.OverheadJob():
            from .bench.host_overhead import measure as measure_overhead

            return measure_overhead(job)
        case jobs.BenchLogitsJob():
            from .bench.child import write_logits as write_contender_logits

            return write_contender_logits(job)
        case jobs.TaskDataJob():
            from .tasks.child import count_questions

            return count_questions(job)
        case jobs.TasksJob():
            from .tasks.child import evaluate

            return evaluate(job)


def opened(folder: str, threads: int) -> Session:
    """The artifact's session; a failure is the load's failure."""
    path = Path(folder)
    described = manifest.read(path)
    try:
        return open_session(path, described, threads=threads)
    except Exception as error:
        raise LoadError(one_line(error)) from error


def write_logits(job: jobs.LogitsJob) -> dict[str, Any]:
    """Prefill each window, then feed it token by token; logits go straight to the file, so memory stays small."""
    vocab = manifest.read(Path(job.folder)).architecture.vocab_size
    session = opened(job.folder, job.threads)
    for task in job.tasks:
        tokens = np.load(task.tokens)
        steps = tokens.shape[1] - task.prefill
        with logits_file.writing(task.out, (len(tokens), steps, vocab)) as write:
            for i, window in enumerate(tokens.tolist()):
                session.reset()
                write(session.feed(window[: task.prefill]))
                for step in range(1, steps):
                    write(session.feed([window[task.prefill + step - 1]]))
                jobs.report_progress(i + 1, len(tokens))
    session.close()
    return {"tasks": len(job.tasks)}


def one_line(error: BaseException) -> str:
    """An exception as one line, its type first when the text alone would not say."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ExportError) else f"{type(error).__name__}: {text}"[:500]


def answer(job: jobs.Job) -> dict[str, Any]:
    """Do a job. The one place that catches everything: an error is an answer here."""
    try:
        return {"result": perform(job)}
    except LoadError as error:
        return {"failed": Outcome.LOAD_FAIL.value, "error": str(error)}
    except jobs.SourceDiffersError as error:
        return {"failed": Outcome.SOURCE_DIFFERS.value, "error": str(error)}
    except Exception as error:
        if disk.is_full(error):
            return {"failed": DISK_FULL, "error": one_line(error)}
        return {"failed": Outcome.RUN_FAIL.value, "error": one_line(error)}


def main() -> int:
    """Read the job, do it, print the answer."""
    orphan.end_with_parent()
    job = jobs.AnyJob.model_validate_json(sys.stdin.buffer.read()).root
    if not isinstance(job, jobs.TaskDataJob | jobs.TasksJob):  # these may read data sets of the hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_libraries()
    given = answer(job)
    print("\n" + json.dumps(given), flush=True)
    return 0 if "result" in given else 1


if __name__ == "__main__":
    sys.exit(main())
