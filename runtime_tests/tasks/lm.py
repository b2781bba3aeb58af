"""lm-evaluation-harness's model interface over a session; text is treated as the harness's own HFLM treats it.

Taken from lm_eval/models/huggingface.py 0.4.13: where a BOS goes, from which side too long a prompt is cut, where an
answer ends. Two differences: an empty continuation has probability 1 (HFLM stops), and the date in a chat template is
fixed, so that a prompt is the same every day.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from numpy.typing import NDArray

from export.checkpoints import chat_template
from export.errors import ExportError
from export.host import mkl
from export.manifest import Manifest
from export.model import Cache
from export.quantization.eager import eager
from runtime_tests.checks.accuracy import log_softmax
from runtime_tests.checks.weights import checkpoint_of
from runtime_tests.sessions import Session, greedy

_DATE = "26 Jul 2024"
"""The same day for templates that are given a text."""
_MAX_GEN_TOKS = 256
"""New tokens where a task sets no limit, as in lm-evaluation-harness's HFLM."""
_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
_ROWS = 256
"""Most tokens whose logits are held at once: 256 × 128,256 of them are 131 MB."""
_CERTAIN = (0.0, True)
"""The score of an empty continuation."""
_PIECE = 512
"""Most tokens of one forward pass of the fp32 model, which computes the logits of each."""
_Request = tuple[Any, list[int], list[int]]


class SessionLM(TemplateLM):  # type: ignore[misc]
    """One session and the tokenizer of its artifact. Greedy, one request after the other."""

    def __init__(
        self, session: Session, tokenizer: Any, described: Manifest, report: Callable[[int, int], None]
    ) -> None:
        super().__init__()
        self.session, self.tokenizer, self.report = session, tokenizer, report
        self.name = described.id
        self.max_length = session.context_length
        self.ends = {*described.tokenizer.eos_ids, tokenizer.eos_token_id}
        self.truncated: Counter[str] = Counter()
        """Requests that did not fit the context and lost their beginning, by kind."""

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return self.name

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """With the BOS that the tokenizer adds by itself, unless the text has its own, as chat templates do."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation by the artifact's own template; without a generation prompt the last message is continued."""
        return chat_template.render(
            self.tokenizer,
            chat_history,
            "the artifact's tokenizer",
            chat_template.FIXED_DAY,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            date_string=_DATE,
        )

    def loglikelihood(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        """log P(continuation | context), greedy or not, per request."""
        scores = iter(super().loglikelihood([request for request in requests if request.args[1]], **options))
        return [next(scores) if request.args[1] else _CERTAIN for request in requests]

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **_: Any) -> list[tuple[float, bool]]:
        """One prefill for all continuations of a context."""
        scores = [_CERTAIN] * len(requests)
        same_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_text, context, continuation) in enumerate(requests):
            same_context[self.fitting(context, continuation)].append(i)
        done = 0
        for shared, members in same_context.items():
            continuations = [requests[i][2] for i in members]
            for i, result in zip(members, _scores(self.session, shared, continuations), strict=True):
                scores[i], done = result, done + 1
                self.report(done, len(requests))
        return scores

    def fitting(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """The context's last tokens that fit before a continuation, whose own last token is never fed."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the context of {self.max_length}")
        self.truncated["loglikelihood"] += len(context) > room
        return tuple(context[-room:])

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log P(text), in windows of the whole context that overlap by one token."""
        windows: list[_Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (total, _greedy) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The greedy answer to each prompt, up to its first stop string."""
        answers = []
        for request in requests:
            answers.append(self.answer(*request.args))
            self.report(len(answers), len(requests))
        return answers

    def answer(self, context: str, generation_kwargs: dict[str, Any]) -> str:
        """One answer; a prompt that does not fit loses its beginning."""
        limits = read_limits(generation_kwargs, self.max_length)
        prompt = self.tok_encode(context)
        self.truncated["generate_until"] += len(prompt) > limits.room

        def ended(tokens: Sequence[int]) -> bool:
            text = self.tokenizer.decode(tokens) if limits.until else ""  # a stop may span tokens, or be a special one
            return tokens[-1] in self.ends or any(stop in text for stop in limits.until)

        tokens = greedy(self.session, prompt[-limits.room :], limits.most, ended)
        tokens = tokens[:-1] if tokens[-1] in self.ends else tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        answer: str = postprocess_generated_text(text, list(limits.until), None)
        return answer

    def get_model_info(self) -> dict[str, Any]:
        """Added by simple_evaluate to the configuration in its results."""
        return {"truncated_requests": dict(self.truncated)}


def _scores(
    session: Session, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> Iterator[tuple[float, bool]]:
    """log P(continuation | context) in nats, and whether it is the greedy answer, for each continuation.

    The context is fed once, and what it shares with the one before, as the examples of few-shot prompts, not again.
    Every continuation starts from the same cache, so its score does not depend on the others'. The last token of a
    continuation is never fed.
    """
    after_context = session.prefill(context)
    for continuation in continuations:
        if not continuation:
            yield _CERTAIN
            continue
        if len(context) >= session.earliest:
            session.rewind(len(context))
        else:  # the window has moved past it
            session.prefill(context)
        total, greedy = _step(after_context[None], continuation[:1])
        for first in range(0, len(continuation) - 1, _ROWS):
            fed = continuation[first : min(first + _ROWS, len(continuation) - 1)]
            more, likeliest = _step(session.feed_each(fed), continuation[first + 1 : first + 1 + len(fed)])
            total, greedy = total + more, greedy and likeliest
        yield total, greedy


def _step(logits: NDArray[np.float32], targets: Sequence[int]) -> tuple[float, bool]:
    """Sum of the log-probabilities of the targets [S] under logits [S, V], and whether each is the likeliest token."""
    ids = np.asarray(targets)
    picked = log_softmax(logits)[np.arange(len(ids)), ids]
    return float(picked.sum()), bool((logits.argmax(axis=-1) == ids).all())


@dataclass(frozen=True)
class _Generation:
    until: tuple[str, ...]
    """Stop strings, not part of the answer."""
    most: int
    """New tokens."""
    room: int
    """Tokens left for the prompt."""


def read_limits(generation_kwargs: Mapping[str, Any], context_length: int) -> _Generation:
    """A task's generation_kwargs. Raises ExportError: sampling, beams, or answers as long as the context."""
    kwargs = normalize_gen_kwargs(dict(generation_kwargs), _MAX_GEN_TOKS)
    if kwargs["do_sample"] or (unknown := sorted(kwargs.keys() - _GREEDY)):
        refused = "sampling" if kwargs["do_sample"] else ", ".join(unknown)
        raise ExportError(f"generation_kwargs ask for {refused}; artifacts decode greedily, choose another task")
    most = int(kwargs["max_gen_toks"])
    if most >= context_length:
        raise ExportError(f"{most} new tokens leave no room for a prompt in a context of {context_length}")
    until = tuple(stop for stop in handle_stop_sequences(kwargs["until"], eos=None) if stop)
    return _Generation(until, most, context_length - most)


class EagerSession(Session):
    """Our model with float32 weights and a cache that grows."""

    measures_speed = False

    def __init__(self, described: Manifest, source: str | None, threads: int) -> None:
        super().__init__(described.contract.kv.context_length, _PIECE, "all", described.architecture.vocab_size)
        mkl.settle()
        torch.set_num_threads(threads)
        checkpoint = checkpoint_of(described, source)
        self.model = eager(checkpoint.read, checkpoint.architecture, "none")
        self.cache: Cache | None = None

    def reset(self) -> None:
        super().reset()
        self.cache = None

    def step(self, tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        past = tuple((keys[:, :, :position], values[:, :, :position]) for keys, values in self.cache or ()) or None
        with torch.inference_mode():
            logits, self.cache = self.model(torch.tensor([tokens]), past)
        rows: NDArray[np.float32] = logits[0].numpy()
        return rows
