"""One of our artifact folders through its own session of `runtime_tests.sessions`."""

from pathlib import Path

from export import manifest
from runtime_tests.jobs import Opening
from runtime_tests.sessions import open_session

from .stepping import SteppingRunner


def open_runner(opening: Opening) -> SteppingRunner:
    """Open the folder's session."""
    folder = Path(opening.path)
    return SteppingRunner(open_session(folder, manifest.read(folder), threads=opening.threads))
