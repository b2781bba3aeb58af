"""Evaluation text that a recipe has calibrated on: judged on it, a loss looks smaller than it is. Knows no models.

Test set contamination, found by n-grams that both texts hold, as Brown et al. 2020 (GPT-3, appendix C) do. The n-grams
are of characters, without whitespace, which re-wrapping changes and Thai does not put between words.
"""

import unicodedata

from export.calibrate import texts
from export.plan import QuantRecipe

from . import evaluation
from .evaluation import Evaluation

LENGTH = 60
"""Characters of an n-gram: about twelve English words. No two texts of ours share one; of 50 characters, some do."""
ALLOWED = 20
"""The most n-grams that an evaluation text may share with a calibration text: a set phrase of 79 characters."""


def problems(judged: Evaluation, recipe: QuantRecipe) -> list[str]:
    """Pairs of an evaluation and a calibration text that hold the same, in words, and texts no longer there to compare.

    Whole files are compared, not windows: which windows are cut depends on the tokenizer. Raises ExportError where a
    text of the evaluation is missing.
    """
    read = dict.fromkeys(text.file for text in recipe.calibration.texts) if recipe.calibration else {}
    wanted = dict.fromkeys(spec.file for spec in judged.texts) if read else {}
    evaluated = {name: ngrams(evaluation.read_text(name)) for name in wanted}
    return [line for name in read for line in compare(evaluated, name, judged, recipe)]


def compare(evaluated: dict[str, set[str]], name: str, judged: Evaluation, recipe: QuantRecipe) -> list[str]:
    """One calibration text against the n-grams of every text of the evaluation."""
    path = texts.TEXT / name
    if not path.is_file() and not name.startswith("hub:"):
        return [
            f"{path}: missing; the recipe {recipe.name!r} calibrated on it, so nothing shows that the evaluation "
            f"{judged.name!r} does not hold the same text; restore it or build the artifact again"
        ]
    where, calibrated = name if name.startswith("hub:") else path, ngrams(texts.read(name))
    found = {file: len(calibrated & held) for file, held in evaluated.items()}
    return [
        f"{evaluation.TEXT / file} holds text that the recipe {recipe.name!r} calibrated on, in {where} ({count:,} "
        f"passages of {LENGTH} characters in both); choose an --eval without it, or take it out of the recipe and "
        "build the artifact again"
        for file, count in found.items()
        if count > ALLOWED
    ]


def ngrams(text: str) -> set[str]:
    """Every run of LENGTH characters, whatever their case, whitespace and Unicode form."""
    squeezed = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return {squeezed[i : i + LENGTH] for i in range(len(squeezed) - LENGTH + 1)}
