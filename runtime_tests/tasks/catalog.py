"""Tasks by name: ours in configs/tasks, which need no network, and lm-evaluation-harness's own. Knows no model."""

import difflib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from export.errors import ExportError
from export.plan import CONFIGS

TASKS = CONFIGS / "tasks"
HUB_PATIENCE_S = 5.0


def local() -> list[str]:
    """Names of the tasks and groups that need no network; the members of a group are named GROUP_MEMBER."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def suggestion() -> str:
    """What can be run anywhere, for error messages."""
    known = local()
    return "tasks that need no network: " + ", ".join(one for one in known if one.rpartition("_")[0] not in known)


@cache
def hub_trouble() -> str:
    """Why the data sets of the Hugging Face hub cannot be reached; empty when they can."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_PATIENCE_S).close()  # noqa: S310
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as error:
        return f"{endpoint}: {getattr(error, 'reason', error)}"
    return ""


def manager(tasks: Sequence[str]) -> Any:
    """An lm_eval.tasks.TaskManager that knows these tasks; an unknown name ends in the nearest ones.

    Libraries of the hub are told to stay offline before they are imported, when no task needs the hub or it cannot be
    reached: their own retries take minutes.
    """
    only_local = set(tasks) <= set(local())
    if only_local or hub_trouble():
        os.environ["HF_HUB_OFFLINE"] = "1"
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=str(TASKS), include_defaults=not only_local)
    for name in tasks:
        if name not in known.all_tasks:
            near = difflib.get_close_matches(name, known.all_tasks, n=5)
            hint = f"near names: {', '.join(near)}; " if near else ""
            raise ExportError(f"no task is named {name!r}; {hint}{suggestion()}")
    return known


def load(tasks: Sequence[str]) -> dict[str, Any]:
    """Every single task behind these names with its data, by its own name; one that does not load is named."""
    trouble = "" if set(tasks) <= set(local()) else hub_trouble()
    known = manager(tasks)
    loaded: dict[str, Any] = {}
    for name in tasks:
        try:
            found = known.load([name])["tasks"]
        except Exception as error:  # whatever a task's own code or the hub's libraries raise
            raise ExportError(explain(name, known, error, trouble)) from error
        if twice := loaded.keys() & found.keys():
            raise ExportError(f"task {min(twice)} is asked for twice: by its name, or in two groups")
        loaded |= found
    return loaded


def explain(name: str, known: Any, error: Exception, trouble: str) -> str:
    """Why a task does not load, in one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    what = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    data_set = next(data_sets(name, known), None)
    if trouble and data_set and isinstance(error, ConnectionError | LocalEntryNotFoundError):
        return f"task {name} needs the hub data set {data_set}, which cannot be reached: {trouble}; {suggestion()}"
    return f"task {name} cannot be loaded{f' (data set {data_set})' if data_set else ''}: {what}"


def data_sets(name: str, known: Any) -> Iterator[str]:
    """Hub data sets of the tasks behind a name."""
    entry = known.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    if path := config.get("dataset_path"):
        yield str(path)
    members = config.get("task")
    for member in sorted(entry.tags) if entry.yaml_path is None else members if isinstance(members, list) else []:
        if isinstance(member, str) and member != name:
            yield from data_sets(member, known)
