"""A conversation by the artifact's own chat template, answered through one KV cache that is reused between turns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from export.architecture import Strict
from export.checkpoints import chat_template
from export.errors import ExportError
from export.manifest import TokenizerIds
from runtime_tests.sessions import saved
from runtime_tests.sessions.base import Session, common_prefix, leaving

from .stream import TextStream

PIECE = 128
"""Tokens of a prompt that are fed between two checks for Ctrl-C."""


class PrefixCache:
    """A session's KV cache between turns: the next prompt is fed from where it differs from the cached tokens."""

    def __init__(self, session: Session, artifact: str) -> None:
        """`artifact`: sha256 of its manifest, to which a saved cache is bound."""
        self.session, self.artifact = session, bytes.fromhex(artifact)

    @property
    def tokens(self) -> list[int]:
        """In the cache, first to last."""
        return self.session.tokens

    @property
    def is_full(self) -> bool:
        """Whether it takes no more tokens; with a sink it always does, and older ones leave."""
        return self.session.sink is None and len(self.tokens) == self.context_length

    @property
    def context_length(self) -> int:
        """Tokens that fit."""
        return self.session.context_length

    def share(self, prompt: Sequence[int]) -> int:
        """Rewind to the common prefix of cache and prompt; its length in tokens, those that have left included.

        The prompt's last token is never counted: it must be fed to get the logits after it.
        """
        left, sink = self.session.left, self.session.sink or 0
        behind = sink + len(left)
        there = [*prompt[:sink], *(prompt[behind:] if list(prompt[sink:behind]) == left else ())]
        shared = min(common_prefix(self.tokens, there), len(there) - 1)
        if shared < max(1, self.session.earliest):
            self.session.reset()
            return 0
        if shared < len(self.tokens):
            self.session.rewind(shared)
        return shared + len(left)

    def feed(self, tokens: Sequence[int], stopped: Callable[[], bool]) -> NDArray[np.float32] | None:
        """Continue the cache; logits [V] after the last token, or None where it was stopped before that.

        Raises ExportError: the runtime cannot take the tokens.
        """
        logits = None
        for start in range(0, len(tokens), PIECE):
            if stopped():
                return None
            try:
                logits = self.session.feed(tokens[start : start + PIECE])
            except Exception as error:
                raise ExportError(f"the artifact's runtime: {' '.join(str(error).split())}") from error
        return logits

    def save(self, path: Path, note: bytes) -> int:
        """Write the cache with a note to a file; its bytes. Raises ExportError: as `saved.save`."""
        try:
            return saved.save(self.session, path, self.artifact, note)
        except saved.SavedError as error:
            raise ExportError(str(error)) from None

    def load(self, path: Path) -> bytes:
        """Fill the cache from a file; the note in it. Raises ExportError: as `saved.restore`."""
        try:
            return saved.restore(self.session, path, self.artifact)
        except saved.SavedError as error:
            raise ExportError(str(error)) from None


_Message = dict[str, str]


class _Turn(Strict):
    """One message of a saved conversation."""

    role: Literal["user", "assistant"]
    content: str


class _Note(Strict):
    """What a saved conversation has beside its cache."""

    system: str | None
    turns: tuple[_Turn, ...]


class End(Enum):
    """Why an answer ended, for people; empty where the model ended it."""

    MODEL = ""
    NOT_BEGUN = "stopped before it began; the message is left out"
    STOPPED = "stopped"
    LIMIT = "--max-new-tokens reached"
    CONTEXT = "the context is full: /reset begins anew"


@dataclass(frozen=True)
class Answer:
    """One answer with its counts and times."""

    text: str
    end: End
    prefilled: int
    """Tokens of the prompt that the cache did not hold."""
    prefill_s: float
    decoded: int
    """Tokens fed one by one."""
    decode_s: float
    ttft_s: float
    """From the message to the first token: template, tokenizer, prefill, choice."""
    context_used: int
    """Tokens in the cache."""
    left: int = 0
    """Older tokens that have made room since the conversation began, where the artifact's policy is a sink."""


class Conversation:
    """Messages, and the tokens of them that the cache holds."""

    def __init__(
        self,
        cache: PrefixCache,
        tokenizer: Any,
        ids: TokenizerIds,
        choose: Callable[[NDArray[np.float32]], int],
        max_new_tokens: int,
    ) -> None:
        self.cache, self.tokenizer, self.choose = cache, tokenizer, choose
        self.ends = {*ids.eos_ids, tokenizer.eos_token_id}
        self.max_new_tokens = max_new_tokens
        self.system: str | None = None
        """The system message; None: the template's own."""
        self.turns: list[_Message] = []

    def ask(self, message: str, show: Callable[[str], None], stopped: Callable[[], bool]) -> Answer:
        """Answer a message, showing whole characters as they come.

        `stopped` is called between tokens. The text shown by then stays in the conversation; a message that was stopped
        before its answer began does not. Raises ExportError, the conversation being as it was: the template cannot
        write the message, it does not fit the context, or the artifact computes no number for it.
        """
        started = time.perf_counter()
        turns = [*self.turns, {"role": "user", "content": message}]
        prompt = self.prompt(turns)
        new = prompt[self.cache.share(prompt) :]
        prefill_started = time.perf_counter()
        logits = self.cache.feed(new, stopped)
        prefill_s = time.perf_counter() - prefill_started
        if logits is None:
            return Answer("", End.NOT_BEGUN, 0, 0.0, 0, 0.0, 0.0, len(self.cache.tokens))
        token = self.choose(logits)
        ttft_s = time.perf_counter() - started
        text, end, steps_s = self.decode(token, show, stopped)
        self.turns = [*turns, {"role": "assistant", "content": text}]
        used = len(self.cache.tokens)
        return Answer(
            text, end, len(new), prefill_s, len(steps_s), sum(steps_s), ttft_s, used, len(self.cache.session.left)
        )

    def decode(
        self, token: int, show: Callable[[str], None], stopped: Callable[[], bool]
    ) -> tuple[str, End, Sequence[float]]:
        """From the first token to the end: text, why it ended, seconds of each step."""
        stream = TextStream(self.tokenizer.backend_tokenizer, show)
        steps_s: list[float] = []
        end = End.MODEL
        while token not in self.ends:
            stream.add(token)
            if len(steps_s) + 1 == self.max_new_tokens:
                end = End.LIMIT
                break
            if self.cache.is_full:
                end = End.CONTEXT
                break
            started = time.perf_counter()
            logits = self.cache.feed([token], stopped)
            if logits is None:
                end = End.STOPPED
                break
            steps_s.append(time.perf_counter() - started)
            token = self.choose(logits)
        stream.end()
        return stream.text, end, steps_s

    def prompt(self, turns: Sequence[_Message], subject: str = "this message") -> list[int]:
        """Token ids of a conversation up to the assistant's answer; the BOS is the template's own.

        Raises ExportError: the template cannot write it, or it does not fit the context.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = chat_template.token_ids(self.tokenizer, [*system, *turns], subject)
        if not ids:
            raise ExportError(f"{subject}: the chat template writes nothing for it")
        if len(ids) <= (limit := self.cache.context_length):
            return ids
        alone = chat_template.token_ids(self.tokenizer, [*system, *turns[-1:]], subject)
        session = self.cache.session
        if session.sink is not None and len(alone) <= limit - leaving(limit, session.sink) - session.sink:
            return ids  # what is older leaves, and nothing of this message
        if len(alone) <= limit:
            raise ExportError(
                f"the context is full: this conversation has {len(ids)} tokens, the artifact's context {limit}; "
                "/reset begins anew"
            )
        with_it = " and the system message" if system and turns[-1:] != list(chat_template.HELLO) else ""
        raise ExportError(
            f"{subject} is too long: {len(alone)} tokens with the chat template{with_it}, the artifact's context has "
            f"{limit}; write a shorter one"
        )

    def instruct(self, system: str | None) -> None:
        """Another system message; None: the template's own. Raises ExportError, it being as it was: as in `prompt`."""
        before, self.system = self.system, system
        try:
            subject = "a message" if system is None else "this system message"
            self.prompt([*self.turns, *chat_template.HELLO], subject)
        except ExportError:
            self.system = before
            raise

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns = []

    def save(self, path: Path) -> int:
        """Write messages and cache to a file; its bytes. Raises ExportError: as `saved.save`."""
        note = _Note(system=self.system, turns=tuple(_Turn.model_validate(turn) for turn in self.turns))
        return self.cache.save(path, note.model_dump_json().encode())

    def load(self, path: Path) -> None:
        """Go on with a saved conversation. Raises ExportError, the conversation being as it was."""
        try:
            note = _Note.model_validate_json(self.cache.load(path))
        except ValidationError:
            raise ExportError(f"{path}: holds a KV cache and no conversation") from None
        turns = [turn.model_dump() for turn in note.turns]
        system = [] if note.system is None else [{"role": "system", "content": note.system}]
        chat_template.token_ids(self.tokenizer, [*system, *turns, *chat_template.HELLO], str(path))
        self.system, self.turns = note.system, turns


class Sampler:
    """The most likely token at temperature 0; above, one drawn from the nucleus.

    `top_p`: the fewest most likely tokens whose probabilities reach it (Holtzman et al. 2019, arXiv 1904.09751).
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generator = np.random.default_rng(seed)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Logits [V] → token id. Raises ExportError: NaN or infinity."""
        if not np.isfinite(logits).all():
            raise ExportError("the artifact computes NaN or infinity; validate it with `python -m runtime_tests`")
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        scaled = (logits[order].astype(np.float64) - logits[order[0]]) / self.temperature
        probabilities = np.exp(scaled)
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        nucleus = probabilities[: max(1, int((before < self.top_p).sum()))]
        return int(order[self.generator.choice(len(nucleus), p=nucleus / nucleus.sum())])
