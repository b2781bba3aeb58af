"""Tasks by name: ours in configs/tasks, which need no network, and lm-evaluation-harness's own.

A task whose questions a recipe was calibrated on is refused: on it an artifact loses less than on other text.
"""

import difflib
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, chdir
from functools import cache
from typing import Any

from export.errors import ExportError
from export.host import disk
from export.plan import CONFIGS, QuantRecipe

TASKS = CONFIGS / "tasks"
_HUB_PATIENCE_S = 5.0


def local() -> list[str]:
    """Names of the tasks and groups that need no network; the members of a group are named GROUP_MEMBER."""
    return sorted(path.stem for path in TASKS.rglob("*.yaml"))


def _suggestion() -> str:
    known = local()
    return "tasks that need no network: " + ", ".join(name for name in known if name.rpartition("_")[0] not in known)


@cache
def hub_trouble() -> str:
    """Why the data sets of the Hugging Face hub cannot be reached; empty where they can."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_HUB_PATIENCE_S).close()  # noqa: S310
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as error:
        return f"{endpoint}: {getattr(error, 'reason', error)}"
    return ""


def manager(tasks: Sequence[str]) -> Any:
    """An lm_eval.tasks.TaskManager with these tasks. Raises ExportError: an unknown name, with the nearest ones.

    Where no task needs the hub, or it cannot be reached, its libraries are set offline before they are imported: their
    own retries take minutes.
    """
    only_local = set(tasks) <= set(local())
    if only_local or hub_trouble():
        os.environ["HF_HUB_OFFLINE"] = "1"
    if only_local:
        from export.pipeline import CACHE

        os.environ["HF_DATASETS_CACHE"] = str(disk.cache_folder(CACHE) / "datasets")
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=str(TASKS), include_defaults=not only_local)
    for name in tasks:
        if name not in known.all_tasks:
            near = difflib.get_close_matches(name, known.all_tasks, n=5)
            hint = f"near names: {', '.join(near)}; " if near else ""
            raise ExportError(f"no task is named {name!r}; {hint}{_suggestion()}")
    return known


def where_data_is() -> AbstractContextManager[None]:
    """Our tasks name their data from the checkout, and lm-evaluation-harness opens it from the current folder."""
    return chdir(CONFIGS.parent)


def load(tasks: Sequence[str]) -> dict[str, Any]:
    """Every single task behind these names with its data, by its own name. Raises ExportError: one does not load."""
    trouble = "" if set(tasks) <= set(local()) else hub_trouble()
    known = manager(tasks)
    loaded: dict[str, Any] = {}
    for name in tasks:
        try:
            with where_data_is():
                members = known.load([name])["tasks"]
        except Exception as error:  # whatever a task's own code or the hub's libraries raise
            raise ExportError(_explain(name, known, error, trouble)) from error
        if twice := loaded.keys() & members.keys():
            raise ExportError(f"task {min(twice)} is given twice: by its name, or in two groups")
        loaded |= members
    return loaded


def _explain(name: str, known: Any, error: Exception, trouble: str) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    data_set = next(_data_sets(name, known), None)
    if trouble and data_set and isinstance(error, ConnectionError | LocalEntryNotFoundError):
        return f"task {name} needs the hub data set {data_set}, which cannot be reached: {trouble}; {_suggestion()}"
    return f"task {name} cannot be loaded{f' (data set {data_set})' if data_set else ''}: {reason}"


def _data_sets(name: str, known: Any) -> Iterator[str]:
    entry = known.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    if path := config.get("dataset_path"):
        yield str(path)
    members = config.get("task")
    for member in sorted(entry.tags) if entry.yaml_path is None else members if isinstance(members, list) else []:
        if isinstance(member, str) and member != name:
            yield from _data_sets(member, known)


def refuse_calibrated(questions: Mapping[str, Iterable[Mapping[str, Any]]], recipes: Sequence[QuantRecipe]) -> None:
    """Raises ExportError where questions of a task are in a calibration text of one of the recipes."""
    from export.quantization import texts
    from runtime_tests.checks.files import ALLOWED, LENGTH, ngrams

    names = {text.file: recipe.name for recipe in recipes if recipe.calibration for text in recipe.calibration.texts}
    calibrated = {name: ngrams(texts.read(name)) for name in names}
    for task, documents in questions.items():
        questioned = [ngrams("\n".join(map(str, document.values()))) for document in documents] if calibrated else []
        for name, text in calibrated.items():
            count = sum(len(text & passages) for passages in questioned)
            if count > ALLOWED:
                raise ExportError(
                    f"task {task} holds text that the recipe {names[name]!r} calibrated on, in {name} ({count:,} "
                    f"passages of {LENGTH} characters in both); leave the task out, or build with another recipe"
                )
