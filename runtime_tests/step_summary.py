"""The page that GitHub Actions shows of a job. Knows nothing about what is written there."""

import os
from pathlib import Path


def append(text: str) -> None:
    """Add Markdown to the summary of the running job; does nothing where none runs."""
    if shown := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(shown).open("a", encoding="utf-8") as file:
            file.write(text)
