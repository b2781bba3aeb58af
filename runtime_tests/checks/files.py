"""Checks that need no runtime: an artifact's files, the text it is judged on, its tokenizer."""

import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export import checkpoints
from export.checkpoints import Source, chat_template, tokenizer
from export.checkpoints.origin import is_of_tokenizer
from export.errors import ExportError
from export.formats import admission
from export.host.console import stage
from export.manifest import Manifest
from export.plan import QuantRecipe
from export.quantization import texts
from runtime_tests import evaluation
from runtime_tests.evaluation import Evaluation
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import SourceError

from . import gates
from .subject import Finding, StoppedError, Subject, require
from .weights import source_of

LENGTH = 60
"""Characters of an n-gram: about twelve English words. No two shipped texts share one; some share 50 characters."""
ALLOWED = 20
"""N-grams that an evaluation text may share with a calibration text: a set phrase of up to 79 characters."""
_CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"})


def check_files(subject: Subject) -> Finding:
    """Sizes and sha256 are those of the manifest. Raises StoppedError."""
    problem = ""
    with stage("files"):
        try:
            admission.require(subject.folder, subject.manifest)
        except ExportError as error:
            problem = str(error)
    return require(gates.count("files intact: problems", [problem] if problem else [], Outcome.DAMAGED), problem)


def check_text(subject: Subject) -> Finding:
    """The recipe did not calibrate on text of the evaluation. Raises StoppedError."""
    with stage("text", "evaluation against calibration"):
        scales = subject.manifest.cache_scales
        read = tuple(scales.texts) if scales else ()
        problems = contamination(subject.setting.evaluation, subject.manifest.plan.quant, read)
    gate = gates.count("evaluation text read in calibration", problems, Outcome.CONTAMINATED)
    return require(gate, "; ".join(problems))


def check_tokenizer(subject: Subject) -> Finding:
    """Same ids, special tokens and chat template as the checkpoint's tokenizer. Raises StoppedError: no checkpoint."""
    described, setting = subject.manifest, subject.setting
    # equal files of one checkpoint: of several artifacts the first is looked at
    digests = sorted((name, info.sha256) for name, info in described.files.items() if is_of_tokenizer(name))
    tokenizer_ids = described.tokenizer.model_copy(update={"notes": ()})
    given = described.checkpoint, described.plan.model, tokenizer_ids, digests

    def differences() -> list[str]:
        texts = [evaluation.read_text(spec.file) for spec in setting.evaluation.texts]
        with source_of(described, setting.source) as origin:
            source = checkpoints.open_source(origin, described.plan.model.architecture)
        return _tokenizer_differences(subject.folder, described, source, texts)

    with stage("tokenizer"):
        try:
            problems = setting.shared.once(("tokenizer", setting.source, repr(given)), differences)
        except SourceError as error:
            raise StoppedError(error.outcome, str(error)) from None
    return Finding((gates.count("tokenizer: differences", problems, Outcome.TOKENIZER_DIFFERS),))


def _tokenizer_differences(folder: Path, described: Manifest, source: Source, texts: Sequence[str]) -> list[str]:
    """Every way in which the folder's tokenizer differs from the one of its checkpoint."""
    with tempfile.TemporaryDirectory() as temporary:
        ids = tokenizer.write(source, Path(temporary), described.architecture.vocab_size)
        expected = tokenizer.load(Path(temporary))
    try:
        tokenizer.try_out(folder / "tokenizer.json")
        shipped = tokenizer.load(folder)
    except ExportError as error:
        return [str(error)]
    problems = (
        []
        if ids.model_copy(update={"notes": described.tokenizer.notes}) == described.tokenizer
        else ["special token ids of the manifest"]
    )
    if shipped.all_special_ids != expected.all_special_ids or shipped.chat_template != expected.chat_template:
        problems.append("special tokens or chat template")
    elif expected.chat_template and _render_chat(shipped) != _render_chat(expected):
        problems.append("a rendered chat")
    return problems + [
        f"the text {text[:24]!r}" for text in ("", *tokenizer.SAMPLES, *texts) if not _same(shipped, expected, text)
    ]


def _same(shipped: Any, expected: Any, text: str) -> bool:
    """Same ids with and without special tokens, and the same text back."""
    if shipped.encode(text) != expected.encode(text):
        return False
    ids = shipped.encode(text, add_special_tokens=False)
    return bool(ids == expected.encode(text, add_special_tokens=False) and shipped.decode(ids) == expected.decode(ids))


def _render_chat(loaded: Any) -> str:
    return chat_template.render(loaded, _CHAT, "the artifact's tokenizer", chat_template.FIXED_DAY)


def contamination(judged: Evaluation, recipe: QuantRecipe, for_cache: Sequence[str] = ()) -> list[str]:
    """Descriptions of evaluation texts that share passages with calibration texts, and of missing calibration texts.

    `for_cache`: files that the scales of the KV cache were measured on.

    Whole files are compared, not windows: which windows are cut depends on the tokenizer. Raises ExportError where a
    text of the evaluation is missing.
    """
    files = [text.file for text in recipe.calibration.texts] if recipe.calibration else []
    calibrated = dict.fromkeys((*files, *for_cache))
    if not calibrated:
        return []
    evaluated = {spec.file: ngrams(evaluation.read_text(spec.file)) for spec in judged.texts}
    return [line for name in calibrated for line in _overlaps(evaluated, name, judged, recipe)]


def _overlaps(evaluated: dict[str, set[str]], name: str, judged: Evaluation, recipe: QuantRecipe) -> list[str]:
    """One calibration text against the n-grams of every text of the evaluation."""
    path = texts.place(name)
    if not path.is_file():
        return [
            f"{path}: missing; the recipe {recipe.name!r} calibrated on it, so nothing shows that the evaluation "
            f"{judged.name!r} does not hold the same text; restore it or build the artifact again"
        ]
    calibrated = ngrams(texts.read(name))
    shared = {file: len(calibrated & passages) for file, passages in evaluated.items()}
    return [
        f"{evaluation.text_file(file)} holds text that the recipe {recipe.name!r} calibrated on, in {path} ({count:,} "
        f"passages of {LENGTH} characters in both); choose an --eval without it, or take it out of the recipe and "
        "build the artifact again"
        for file, count in shared.items()
        if count > ALLOWED
    ]


def ngrams(text: str) -> set[str]:
    """Every run of LENGTH characters, regardless of case, whitespace and Unicode form."""
    squeezed = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return {squeezed[i : i + LENGTH] for i in range(len(squeezed) - LENGTH + 1)}
