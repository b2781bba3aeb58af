"""Evaluations (`configs/evals/*.yaml`) and the windows of tokens they feed, cut from `configs/evals/text`."""

import hashlib
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from export.architecture import Positive, Strict
from export.errors import ExportError, absence, found
from export.manifest import Manifest
from export.plan import CONFIGS, load_named

from .checks.accuracy import Labels
from .sessions.base import leaving

TEXT = CONFIGS / "evals" / "text"
_PLACES = (128, 1024, 2048, 4096)
"""Tokens in the cache at which a kind of cache is compared, besides the end of the context."""
_STEPS = 64
"""Single tokens up to each."""
_FARTHEST = 8192
"""Attention of the reference model takes the square of it."""


class TextSpec(Strict):
    """One text and how many windows are cut from it."""

    domain: str
    """Name under which its results are listed."""
    file: str
    """In configs/evals/text."""
    windows: Positive
    """How many windows are cut from it, spread evenly."""


class SpeedSpec(Strict):
    """What is timed, in tokens."""

    prompts: tuple[Positive, ...]
    """Prompt lengths; those that do not fit the context are skipped. The first one gives the time to first token."""
    generate: Positive
    """Tokens that are generated and timed."""
    repeats: Annotated[int, Field(ge=5)]
    """Timed runs."""
    warmups: Annotated[int, Field(ge=1)]
    """Runs before them that are not timed."""


class Evaluation(Strict):
    """One YAML of configs/evals."""

    name: str
    description: str
    """For people; decides nothing."""
    prefill: Annotated[int, Field(ge=2)]
    """Tokens of a window that are fed before the steps."""
    decode: Annotated[int, Field(ge=64)]
    """Single-token steps after the prefill: an artifact is judged with a filled cache."""
    texts: tuple[TextSpec, ...]
    """What is fed, each with its number of windows."""
    max_rewriting_error: float
    """Of our fp32 logits against Hugging Face's: largest difference as a share of the largest logit."""
    max_filled_context: Positive
    """A cache of more slots is not filled to its last position (minutes on an emulated processor)."""
    speed: SpeedSpec
    """What is timed, and how often."""


@dataclass(frozen=True)
class Windows:
    """Token windows and the domain of each."""

    tokens: NDArray[np.int64]
    """[W, prefill + decode + 1]; the last token is only a target."""
    domains: tuple[str, ...]
    prefill: int

    @property
    def targets(self) -> NDArray[np.int64]:
        """The token after each scored position, [W, decode + 1]."""
        return self.tokens[:, self.prefill :]

    @property
    def sha256(self) -> str:
        """Of the tokens: two models that were fed the same windows may be compared window by window."""
        return hashlib.sha256(repr((self.tokens.tolist(), self.prefill)).encode()).hexdigest()

    @property
    def labels(self) -> Labels:
        """Domain and position range of the scored positions."""
        return Labels(self.domains, position_ranges(self.prefill, self.tokens.shape[1] - self.prefill - 1))


def load(name: str) -> Evaluation:
    """The evaluation of `configs/evals/NAME.yaml`. Raises ExportError."""
    return load_named(Evaluation, "evals", name)


def cut_windows(evaluation: Evaluation, tokenizer: Any, manifest: Manifest) -> Windows:
    """Cut every text of an evaluation; a window begins with BOS where the tokenizer adds one.

    Raises ExportError: a window does not fit the context, or a token the vocabulary.
    """
    from export.quantization.texts import cut  # its room loads torch

    length = evaluation.prefill + evaluation.decode + 1
    context = manifest.contract.kv.context_length
    if length > context:
        raise ExportError(
            f"evaluation {evaluation.name!r} needs {length} tokens, {manifest.id} has a context of {context}"
        )
    rows: list[list[int]] = []
    domains: list[str] = []
    for spec in evaluation.texts:
        rows += cut(read_text(spec.file), f"evaluation text {spec.file}", spec.windows, length, tokenizer)
        domains += [spec.domain] * spec.windows
    return Windows(_within(rows, manifest), tuple(domains), evaluation.prefill)


def far_windows(evaluation: Evaluation, tokenizer: Any, manifest: Manifest) -> dict[str, Windows]:
    """By its place, the window that fills the cache up to it: 128 tokens, 1,024 and so on, and the whole context.

    All begin with the same text, the evaluation's, again from its start where the context is longer. Not beyond
    `max_filled_context` of the evaluation or 8,192 tokens. With a sink the last place is where older tokens have left a
    second time, if the context is not longer than that.
    """
    from export.checkpoints.tokenizer import adds_bos

    kv = manifest.contract.kv
    end = min(kv.context_length, evaluation.max_filled_context, _FARTHEST)
    past = [end + leaving(end, kv.sink) + _STEPS // 2] if kv.sink and end == kv.context_length else []
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    text = "\n".join(read_text(text.file) for text in evaluation.texts)
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = _within([[*start, *islice(cycle(ids), max(end, *past, end) + 1 - len(start))]], manifest)
    places = [*(place for place in _PLACES if place < end), end, *past]
    return {f"{place:,} tokens": Windows(tokens[:, : place + 1], ("",), max(2, place - _STEPS)) for place in places}


def template_window(tokenizer: Any, manifest: Manifest) -> Windows:
    """What text does not hold and conversations do: BOS, a message as the chat template writes it, every end token.

    One window whose tokens are all scored, as many as the context has room for. Raises ExportError: the template fails,
    or a token is beyond the vocabulary.
    """
    from export.checkpoints import chat_template

    ids, described = [], manifest.tokenizer
    if described.has_chat_template:
        ids = chat_template.token_ids(tokenizer, chat_template.HELLO, manifest.id)
    start = [described.bos_id] if described.bos_id is not None and ids[:1] != [described.bos_id] else []
    fed = [*start, *ids, *described.eos_ids][-manifest.contract.kv.context_length :]
    return Windows(_within([[*fed, fed[-1]]], manifest), ("template",), prefill=1)


def _within(rows: list[list[int]], manifest: Manifest) -> NDArray[np.int64]:
    tokens = np.array(rows, dtype=np.int64)
    if tokens.max() >= manifest.architecture.vocab_size:
        raise ExportError(f"{manifest.id}: its tokenizer gives id {tokens.max()}, beyond the vocabulary")
    return tokens


def position_ranges(prefill: int, decode: int) -> tuple[str, ...]:
    """The range of the context that each scored position lies in: the end of the prefill, then decoded tokens.

    The ranges double (64–127, 128–255 …, the first token of the context is 0) and end where the window does. The end
    of the prefill is a range of its own because a different call computed it.
    """
    last = prefill + decode - 1
    lows = (1 << (position.bit_length() - 1) for position in range(prefill, last + 1))
    return f"{prefill - 1} (prefill)", *(f"{max(low, prefill)}–{min(2 * low - 1, last)}" for low in lows)


def text_file(name: str) -> Path:
    """Where a text of `configs/evals/text` is, the user's own before ours."""
    return found(TEXT, name)


def read_text(name: str) -> str:
    """A text of `configs/evals/text`. Raises ExportError where it is missing."""
    path = text_file(name)
    if not path.is_file():
        raise ExportError(f"{path}: {absence(path)}; an evaluation in configs/evals names it")
    return path.read_text(encoding="utf-8")
