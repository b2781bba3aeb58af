"""A conversation as the artifact's own chat template writes it, answered through one kept cache. Knows no terminal."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from export import chat_template
from export.contract import TokenizerIds

from .kept_cache import KeptCache

Message = dict[str, str]


class End(Enum):
    """Why an answer ended, in words; empty where there is nothing to say."""

    MODEL = ""
    NOT_BEGUN = "stopped before it began; the message is left out"
    STOPPED = "stopped"
    LIMIT = "--max-new-tokens reached"
    CONTEXT = "the context is full: /reset begins anew"


class NoRoomError(Exception):
    """A message that does not fit the context; the conversation is as it was."""


@dataclass(frozen=True)
class Answer:
    """One answer, and what it took."""

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


class Conversation:
    """Messages, and the tokens of them that the cache holds."""

    def __init__(
        self,
        cache: KeptCache,
        tokenizer: Any,
        ids: TokenizerIds,
        context_length: int,
        choose: Callable[[NDArray[np.float32]], int],
        max_new_tokens: int,
    ) -> None:
        self.cache, self.tokenizer, self.choose = cache, tokenizer, choose
        self.ends = {*ids.eos_ids, tokenizer.eos_token_id}
        self.context_length, self.max_new_tokens = context_length, max_new_tokens
        self.system: str | None = None
        """The system message; None: what the template says by itself."""
        self.turns: list[Message] = []

    def ask(self, message: str, show: Callable[[str], None], stopped: Callable[[], bool]) -> Answer:
        """Answer a message, showing whole characters as they come.

        `stopped` is asked between tokens. What was shown by then stays in the conversation; a message that was stopped
        before its answer began does not. Raises NoRoomError; ExportError: the template cannot write the message.
        """
        started = time.perf_counter()
        asked = [*self.turns, {"role": "user", "content": message}]
        prompt = self.prompt(asked)
        if len(prompt) > self.context_length:
            raise NoRoomError(
                f"the context is full: this conversation has {len(prompt)} tokens, the artifact's context "
                f"{self.context_length}; the message is left out, /reset begins anew"
            )
        new = prompt[self.cache.share(prompt) :]
        prefill_started = time.perf_counter()
        logits = self.cache.feed(new, stopped)
        prefill_s = time.perf_counter() - prefill_started
        if logits is None:
            return Answer("", End.NOT_BEGUN, 0, 0.0, 0, 0.0, 0.0, len(self.cache.tokens))
        token = self.choose(logits)
        ttft_s = time.perf_counter() - started
        text, end, steps_s = self.decode(token, show, stopped)
        self.turns = [*asked, {"role": "assistant", "content": text}]
        return Answer(
            text, end, len(new), prefill_s, len(steps_s), sum(steps_s), ttft_s, len(self.cache.tokens)
        )  # fmt: skip

    def decode(
        self, token: int, show: Callable[[str], None], stopped: Callable[[], bool]
    ) -> tuple[str, End, Sequence[float]]:
        """From the first token to the end: text, why it ended, seconds of each step."""
        characters = DecodeStream(skip_special_tokens=True)  # holds back what is not a whole character yet
        text = ""
        steps_s: list[float] = []
        while token not in self.ends:
            if piece := characters.step(self.tokenizer.backend_tokenizer, token):
                text += piece
                show(piece)
            if len(steps_s) + 1 == self.max_new_tokens:
                return text, End.LIMIT, steps_s
            if len(self.cache.tokens) == self.context_length:
                return text, End.CONTEXT, steps_s
            started = time.perf_counter()
            logits = self.cache.feed([token], stopped)
            if logits is None:
                return text, End.STOPPED, steps_s
            steps_s.append(time.perf_counter() - started)
            token = self.choose(logits)
        return text, End.MODEL, steps_s

    def prompt(self, turns: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks; the template brings its own BOS."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return chat_template.token_ids(self.tokenizer, [*system, *turns], "this message")

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns = []
