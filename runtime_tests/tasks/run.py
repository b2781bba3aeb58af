"""Tasks on artifacts of this machine, each model in a child process of its own; results go to build/tasks."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from export import manifest
from export.errors import ExportError
from export.manifest import ROOT, Manifest
from export.plan import CONFIGS
from export.progress import console, counted, stage

from .. import isolation, jobs
from ..record import Outcome
from . import results
from .compare import REFERENCE, Compared, compare
from .results import Results

TOKENIZER_FILES = ("tokenizer", "chat_template", "special_tokens", "generation_config")
LOAD_LIMIT_S = 1800.0
"""For the tasks' data, which may come over the network."""


@dataclass(frozen=True)
class Asked:
    """What to evaluate, and how."""

    tasks: tuple[str, ...]
    limit: int | None
    """Questions of each task; null: all."""
    chat: bool
    """Apply the chat template of the artifacts that have one."""
    reference: bool
    """Evaluate the fp32 model of the checkpoint too."""
    source: str | None
    """Where checkpoints are, when not where the manifests say."""
    threads: int
    patience_s: float
    """Longest time without an answered question."""


def parse(names: str) -> tuple[str, ...]:
    """`one,two` as task names."""
    tasks = tuple(name.strip() for name in names.split(",") if name.strip())
    if not tasks:
        raise ExportError("--tasks: no task is named; see configs/tasks/README.md")
    return tasks


def evaluate(cases: Sequence[tuple[Path, Manifest]], asked: Asked, build: Path) -> tuple[list[Compared], bool]:
    """Evaluate artifact by artifact: their scores, and whether every model gave some.

    What is missing or damaged ends here, before any model is loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ExportError("--tasks needs lm-evaluation-harness; install it with `pip install -e '.[tasks]'`")
    for folder, described in cases:
        manifest.verify_files(folder, described)
    announce(asked, [folder for folder, _ in cases])
    found: list[Results | None] = []
    for folder, described in cases:
        console.print(f"[bold]{described.id}[/bold]")
        if asked.reference:
            found.append(evaluate_reference(folder, described, asked, build))
        found.append(evaluate_artifact(folder, described, asked, build))
    return compare([one for one in found if one]), all(found)


def announce(asked: Asked, folders: Sequence[Path]) -> None:
    """Load the tasks' data and say how much will be asked."""
    job = jobs.TaskDataJob(tasks=asked.tasks, folders=tuple(str(folder.resolve()) for folder in folders))
    with stage("tasks", ", ".join(asked.tasks)):
        ended = isolation.run(job, limit_s=LOAD_LIMIT_S)
    if ended.outcome is not Outcome.PASS:
        raise ExportError(ended.detail)
    questions: dict[str, int] = ended.result["questions"]
    total = sum(min(count, asked.limit or count) for count in questions.values())
    console.print(
        f"  questions for each model: {total:,}, of {len(questions)} {'task' if len(questions) == 1 else 'tasks'}"
    )


def evaluate_artifact(folder: Path, described: Manifest, asked: Asked, build: Path) -> Results | None:
    """The artifact in its runtime."""
    facts = facts_of(described) | {
        "recipe": described.plan.quant.name,
        "target": described.plan.target.name,
        "manifest_sha256": manifest.digest(folder),
    }
    return perform(job_of(folder, described, asked, described.id, facts, build), asked.patience_s)


def evaluate_reference(folder: Path, described: Manifest, asked: Asked, build: Path) -> Results | None:
    """The fp32 model of the checkpoint; results under the same key are taken from an earlier run."""
    name = f"{described.plan.model.name}_fp32_eager"
    key = reference_key(described, asked)
    for found in reversed(results.kept(build)):
        if found.model == name and found.facts.get("key") == key:
            console.print(f"  fp32: results of an earlier run, {found.path}", soft_wrap=True)
            return found
    facts = facts_of(described) | {"recipe": "fp32", "target": REFERENCE, "key": key}
    return perform(job_of(folder, described, asked, name, facts, build), asked.patience_s)


def facts_of(described: Manifest) -> dict[str, str | int | None]:
    """What tells whose scores may be compared, and what they belong to."""
    code = manifest.source_info()
    return {
        "base": described.plan.model.name,
        "checkpoint": checkpoint_key(described),
        "context_length": described.contract.kv.context_length,
        "commit": code.commit + (" with local changes" if code.dirty else ""),
    }


def checkpoint_key(described: Manifest) -> str:
    """One text for the weights an artifact was made from."""
    held = described.checkpoint.sha256 or described.checkpoint.origin
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]


def reference_key(described: Manifest, asked: Asked) -> str:
    """Hash of everything that decides what the fp32 model scores."""
    data = [path for path in (CONFIGS / "tasks").rglob("*") if path.is_file()]
    texts = list((CONFIGS / "evals" / "text" / "udhr").iterdir())
    code = [Path(__file__).with_name(f"{name}.py") for name in ("child", "eager", "generation", "lm", "scoring")]
    files = sorted([*data, *texts, *code, ROOT / "export" / "model.py"])
    inputs = {
        "checkpoint": checkpoint_key(described),
        "architecture": described.architecture.model_dump(),
        "context_length": described.contract.kv.context_length,
        "tokenizer": {name: info.sha256 for name, info in described.files.items() if name.startswith(TOKENIZER_FILES)},
        "asked": [asked.tasks, asked.limit, asked.chat],
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "versions": [version("lm_eval"), version("torch"), version("transformers")],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def job_of(
    folder: Path, described: Manifest, asked: Asked, name: str, facts: dict[str, str | int | None], build: Path
) -> jobs.TasksJob:
    """The job that evaluates one model."""
    return jobs.TasksJob(
        folder=str(folder.resolve()),
        eager=facts["target"] == REFERENCE,
        source=asked.source,
        threads=asked.threads,
        tasks=asked.tasks,
        limit=asked.limit,
        chat=asked.chat and described.tokenizer.has_chat_template,
        name=name,
        facts=facts,
        out=str((build / "tasks" / name).resolve()),
    )


def perform(job: jobs.TasksJob, patience_s: float) -> Results | None:
    """Evaluate in a child process; how it failed is said, and is no end of the run."""
    label = "fp32" if job.eager else "artifact"
    with counted(label) as progress, stage(label, job.name):
        ended = isolation.run(job, limit_s=patience_s, on_progress=progress, renewed=True)
    if ended.outcome is not Outcome.PASS:
        console.print(f"{job.name}: {ended.outcome.value}: {ended.detail}", style="red", markup=False, soft_wrap=True)
        return None
    return results.read(Path(ended.result["results"]))
