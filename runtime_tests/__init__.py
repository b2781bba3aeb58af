"""From artifact to evidence: run the shipped file, compare it, measure it, record the results.

Start at `validate`; its checks start jobs, and a job opens the artifact in a session. `open_artifact` and `prove` are
the door for Python (docs/python.md).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evidence.record import Record
    from .sessions import Session


def open_artifact(folder: str | Path, *, threads: int | None = None) -> "Session":
    """An artifact in its runtime, in this process: `feed` takes token ids and gives float32 logits [V].

    Its runtime is native code, whose crash ends this process. `threads`: by default as many as suit this machine.
    Raises ExportError: the folder holds what no build of ours writes, or its runtime does not load it.
    """
    from export.errors import ExportError
    from export.formats import admission

    admission.admit(Path(folder))
    from .jobs.worker import LoadError, opened
    from .places import environment

    try:
        return opened(str(folder), threads or environment.threads())
    except LoadError as error:
        raise ExportError(f"{folder}: does not load: {error}") from None


def prove(
    *folders: str | Path, device: str = "host", source: str | Path | None = None, evaluation: str | None = None
) -> "Sequence[Record]":
    """Validate artifacts as `python -m runtime_tests` does, reports in `build` included; one record for each.

    `device` and `evaluation` are names in devices and configs/evals, `source` is where the checkpoint is, by default
    where the artifact was built from. `record.holds`: every gate does. Raises ExportError: a mistake in any of these,
    or a machine or device that cannot run it.
    """
    from . import __main__ as command

    return command.proven([Path(folder) for folder in folders], device, source, evaluation)
