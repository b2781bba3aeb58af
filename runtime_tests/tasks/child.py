"""Evaluating tasks, inside the child process: lm-evaluation-harness's own evaluation, its own results file.

The file is what `lm_eval --output_path` writes. It appears under its final name when it is whole.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from export import manifest, tokenizer
from export.errors import ExportError

from ..jobs import TaskDataJob, TasksJob, report_progress
from ..session import Session
from . import catalog, overlap

BOOTSTRAP_ITERS = 1000
"""Resamples behind the standard error of the few metrics that have no formula for it."""


def count_questions(job: TaskDataJob) -> dict[str, Any]:
    """Questions of every single task behind the names; what these artifacts cannot be asked is refused."""
    loaded = catalog.load(job.tasks)
    artifacts = [manifest.read(Path(folder)) for folder in job.folders]
    overlap.refuse({name: task.eval_docs for name, task in loaded.items()}, [one.plan.quant for one in artifacts])
    for name, task in loaded.items():
        for context_length in {one.contract.kv.context_length for one in artifacts}:
            refuse_generation(name, task, context_length)
    return {"questions": {name: len(task.eval_docs) for name, task in loaded.items()}}


def refuse_generation(name: str, task: Any, context_length: int) -> None:
    """Answers that greedy decoding in this context cannot give end here, not after an hour."""
    from . import generation

    if task.OUTPUT_TYPE == "generate_until":
        try:
            generation.read(task.config.generation_kwargs, context_length)
        except ExportError as error:
            raise ExportError(f"task {name}: {error}") from None


def evaluate(job: TasksJob) -> dict[str, Any]:
    """Run every task and write results and samples; gives the results file."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork a process that runs native threads
    os.environ["TQDM_DISABLE"] = "1"
    known = catalog.manager(job.tasks)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from .lm import SessionLM

    folder = Path(job.folder)
    described = manifest.read(folder)
    session = open_model(job)
    model = SessionLM(session, tokenizer.load(folder), described, report_progress)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=out) as part:
        tracker = EvaluationTracker(output_path=part)
        results = simple_evaluate(
            model=model,
            model_args={"pretrained": job.name, **job.facts},
            tasks=list(job.tasks),
            batch_size=1,
            limit=job.limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            evaluation_tracker=tracker,
            apply_chat_template=job.chat,
            fewshot_as_multiturn=job.chat,
            task_manager=known,
        )
        session.close()
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, answers in samples.items():
            tracker.save_results_samples(task_name=task, samples=answers)
        return {"results": str(adopt(Path(part), out))}


def open_model(job: TasksJob) -> Session:
    """The artifact in its runtime, or the fp32 model of its checkpoint."""
    if not job.eager:
        from ..worker import opened

        return opened(job.folder, job.threads)
    from .eager import EagerSession

    return EagerSession(manifest.read(Path(job.folder)), job.source, job.threads)


def adopt(part: Path, out: Path) -> Path:
    """Move what lm-eval wrote below `part` to `out`, the results file last; it only warns where it could not write."""
    written = sorted(part.glob("*/*"), key=lambda path: path.name.startswith("results_"))
    if not written or not written[-1].name.startswith("results_"):
        raise ExportError(f"{out}: lm-evaluation-harness could not write its results there")
    for path in written:
        path.rename(out / path.name)
    return out / written[-1].name
