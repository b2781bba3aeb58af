"""Tasks on artifacts of this machine, each model in a child process of its own; results go to build/tasks.

The child runs lm-evaluation-harness's own evaluation. Its results file is the one that `lm_eval --output_path` writes,
and gets its final name when it is complete.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export import manifest
from export.checkpoints import tokenizer, whereabouts
from export.errors import ExportError
from export.formats import admission
from export.host import digests
from export.host.console import console, counted, stage
from export.manifest import Manifest
from export.plan import CONFIGS
from runtime_tests import jobs
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import isolation
from runtime_tests.sessions import Session

from . import catalog, results
from .results import REFERENCE, Compared, Results, compare

_HERE = Path(__file__).parent
_TOKENIZER_FILES = ("tokenizer", "chat_template", "additional", "added_tokens", "special_tokens", "generation_config")
_LOAD_LIMIT_S = 1800.0
"""For the tasks' data, which may come over the network."""
_BOOTSTRAP_ITERS = 1000
"""Resamples behind the standard error of the few metrics that have no formula for it."""


@dataclass(frozen=True)
class TaskOptions:
    """Tasks, and how artifacts are evaluated on them."""

    tasks: tuple[str, ...]
    limit: int | None
    """Questions of each task; None: all."""
    chat: bool
    """Apply the chat template of the artifacts that have one."""
    reference: bool
    """Evaluate the fp32 model of the checkpoint too."""
    source: str | None
    """Where checkpoints are; None: where the manifests say."""
    threads: int
    patience_s: float
    """Longest time without an answered question."""


def parse(names: str) -> tuple[str, ...]:
    """`one,two` as task names."""
    tasks = tuple(name.strip() for name in names.split(",") if name.strip())
    if not tasks:
        raise ExportError("--tasks: no task is named; see configs/tasks/README.md")
    return tasks


def evaluate(cases: Sequence[tuple[Path, Manifest]], options: TaskOptions, build: Path) -> tuple[list[Compared], bool]:
    """Evaluate artifact by artifact: their scores, and whether every model gave some.

    Raises ExportError before any model is loaded where a package, an artifact's file or a task is missing or damaged.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ExportError("--tasks needs lm-evaluation-harness; install it with `pip install -e '.[tasks]'`")
    for folder, described in cases:
        admission.require(folder, described)
    _announce(options, [folder for folder, _ in cases])
    outcomes: list[Results | None] = []
    for folder, described in cases:
        console.print(described.id, style="bold", soft_wrap=True)
        if options.reference:
            outcomes.append(_evaluate_reference(folder, described, options, build))
        outcomes.append(_evaluate_artifact(folder, described, options, build))
    return compare(list(filter(None, outcomes))), all(outcomes)


def _announce(options: TaskOptions, folders: Sequence[Path]) -> None:
    """Load the tasks' data and print the number of questions."""
    job = jobs.TaskDataJob(tasks=options.tasks, folders=tuple(str(folder.resolve()) for folder in folders))
    with stage("tasks", ", ".join(options.tasks)):
        ended = isolation.run(job, limit_s=_LOAD_LIMIT_S)
    if ended.outcome is not Outcome.PASS:
        raise ExportError(ended.detail)
    questions: dict[str, int] = ended.result["questions"]
    total = sum(min(count, options.limit or count) for count in questions.values())
    console.print(
        f"  questions for each model: {total:,}, of {len(questions)} {'task' if len(questions) == 1 else 'tasks'}"
    )


def _evaluate_artifact(folder: Path, described: Manifest, options: TaskOptions, build: Path) -> Results | None:
    plan = described.plan
    facts = {"recipe": plan.quant.name, "target": plan.target.name, "manifest_sha256": manifest.digest(folder)}
    return _perform(folder, described, options, described.id, facts, build)


def _evaluate_reference(folder: Path, described: Manifest, options: TaskOptions, build: Path) -> Results | None:
    """The fp32 model of the checkpoint; results of an earlier run are taken where they have the same key."""
    name = f"{described.plan.name}_fp32_eager"
    key = reference_key(described, options)
    for earlier in reversed(results.read_all(build)):
        if earlier.model == name and earlier.facts.get("key") == key:
            console.print(f"  fp32: results of an earlier run, {earlier.path}", soft_wrap=True)
            return earlier
    return _perform(folder, described, options, name, {"recipe": "fp32", "target": REFERENCE, "key": key}, build)


def _checkpoint_key(described: Manifest) -> str:
    identity = described.checkpoint.sha256 or described.checkpoint.origin
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def reference_key(described: Manifest, options: TaskOptions) -> str:
    """Hash of everything that decides the scores of the fp32 model."""
    data = [path for path in (CONFIGS / "tasks").rglob("*") if path.is_file()]
    texts = list((CONFIGS / "evals" / "text" / "udhr").iterdir())
    inputs = {
        "checkpoint": _checkpoint_key(described),
        "architecture": described.architecture.model_dump(),
        "context_length": described.contract.kv.context_length,
        "tokenizer": {name: info.sha256 for name, info in described.files.items() if name.startswith(_TOKENIZER_FILES)},
        "asked": [options.tasks, options.limit, options.chat],
        "data": [digests.sha256(path) for path in sorted([*data, *texts])],
        "code": [digests.room_digest("checkpoints", "quantization", "model.py"), digests.code_digest(_HERE)],
        "versions": [version("lm_eval"), version("torch"), version("transformers")],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _perform(
    folder: Path, described: Manifest, options: TaskOptions, name: str, facts: dict[str, str], build: Path
) -> Results | None:
    """Evaluate a model in a child process; a failure is printed and does not end the run.

    The facts are recorded with the results: scores are compared where base, checkpoint and context length are equal.
    """
    code = manifest.source_info()
    shared: dict[str, str | int | None] = {
        "base": described.plan.model.name,
        "checkpoint": _checkpoint_key(described),
        "context_length": described.contract.kv.context_length,
        "commit": code.commit + (" with local changes" if code.dirty else ""),
    }
    job = jobs.TasksJob(
        folder=str(folder.resolve()),
        eager=facts["target"] == REFERENCE,
        source=options.source or whereabouts.place(described.checkpoint),
        threads=options.threads,
        tasks=options.tasks,
        limit=options.limit,
        chat=options.chat and described.tokenizer.has_chat_template,
        name=name,
        facts={**shared, **facts},
        out=str((build / "tasks" / name).resolve()),
    )
    label = "fp32" if job.eager else "artifact"
    with counted(label) as progress, stage(label, name):
        ended = isolation.run(job, limit_s=options.patience_s, on_progress=progress, renewed=True)
    if ended.outcome is not Outcome.PASS:
        console.print(f"{name}: {ended.outcome.value}: {ended.detail}", style="red", soft_wrap=True)
        return None
    return results.read(Path(ended.result["results"]))


def count_questions(job: jobs.TaskDataJob) -> dict[str, Any]:
    """Questions of every single task behind the names. Raises ExportError: a task is not for these artifacts."""
    loaded = catalog.load(job.tasks)
    artifacts = [manifest.read(Path(folder)) for folder in job.folders]
    questions = {name: task.eval_docs for name, task in loaded.items()}
    catalog.refuse_calibrated(questions, [artifact.plan.quant for artifact in artifacts])
    for name, task in loaded.items():
        if task.OUTPUT_TYPE == "generate_until":
            _refuse_generation(name, task, min(artifact.contract.kv.context_length for artifact in artifacts))
    return {"questions": {name: len(documents) for name, documents in questions.items()}}


def _refuse_generation(name: str, task: Any, context_length: int) -> None:
    """Refuse answers that greedy decoding in this context cannot give, before hours of evaluation."""
    from .lm import read_limits

    try:
        read_limits(task.config.generation_kwargs, context_length)
    except ExportError as error:
        raise ExportError(f"task {name}: {error}") from None


def evaluate_here(job: jobs.TasksJob) -> dict[str, Any]:
    """Run every task and write results and samples; {"results": path of the results file}."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork a process that runs native threads
    os.environ["TQDM_DISABLE"] = "1"
    known = catalog.manager(job.tasks)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from .lm import SessionLM

    folder = Path(job.folder)
    described = manifest.read(folder)
    session = _open_model(job)
    model = SessionLM(session, tokenizer.load(folder), described, jobs.report_progress)
    out = Path(job.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=out) as part, catalog.where_data_is():
        tracker = EvaluationTracker(output_path=part)
        results = simple_evaluate(
            model=model,
            model_args={"pretrained": job.name, **job.facts},
            tasks=list(job.tasks),
            batch_size=1,
            limit=job.limit,
            bootstrap_iters=_BOOTSTRAP_ITERS,
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
        return {"results": str(_adopt(Path(part), out))}


def _open_model(job: jobs.TasksJob) -> Session:
    if not job.eager:
        from runtime_tests.jobs.worker import opened

        return opened(job.folder, job.threads)
    from .lm import EagerSession

    return EagerSession(manifest.read(Path(job.folder)), job.source, job.threads)


def _adopt(part: Path, out: Path) -> Path:
    """Move lm-eval's files from below `part` to `out`, the results file last; a missing one is an error only here."""
    written = sorted(part.glob("*/*"), key=lambda path: path.name.startswith("results_"))
    if not written or not written[-1].name.startswith("results_"):
        raise ExportError(f"{out}: lm-evaluation-harness could not write its results there")
    for path in written:
        path.rename(out / path.name)
    return out / written[-1].name
