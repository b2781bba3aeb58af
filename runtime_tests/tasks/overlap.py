"""Tasks whose questions a recipe has calibrated on: judged on them, an artifact loses less than it does elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from export.calibrate import texts
from export.errors import ExportError
from export.plan import QuantRecipe

from ..contamination import ALLOWED, LENGTH, ngrams


def refuse(questions: Mapping[str, Iterable[Mapping[str, Any]]], recipes: Sequence[QuantRecipe]) -> None:
    """Compare the questions of each task with every calibration text of the recipes; raises ExportError."""
    names = {text.file: recipe.name for recipe in recipes if recipe.calibration for text in recipe.calibration.texts}
    calibrated = {name: ngrams(texts.read(name)) for name in names}
    for task, documents in questions.items():
        asked = [ngrams("\n".join(map(str, document.values()))) for document in documents] if calibrated else []
        for name, held in calibrated.items():
            count = sum(len(held & passages) for passages in asked)
            if count > ALLOWED:
                raise ExportError(
                    f"task {task} holds text that the recipe {names[name]!r} calibrated on, in {name} ({count:,} "
                    f"passages of {LENGTH} characters in both); leave the task out, or build with another recipe"
                )
