"""A .pte through ExecuTorch's own TextLLMRunner, text in and text out, timed by the runner's own statistics.

Its clock counts milliseconds and includes tokenization and sampling; an end-of-sequence token ends a pass early.
"""

from collections.abc import Sequence
from typing import Any

# custom_sdpa, update_cache and the quantized embedding live in libraries these imports load
import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401
import numpy as np
import torch
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime_tests.jobs import Opening

from . import Pass, Runner

_NS_PER_MS = 1_000_000


class _TextRunner(Runner):
    """Token ids are decoded to text first; a pass counts the tokens that the runner made of that text."""

    def __init__(self, path: str, tokenizer: str) -> None:
        self.tokenizer = Tokenizer.from_file(tokenizer)
        self.runner = TextLLMRunner(path, tokenizer)
        self._run([self.tokenizer.encode("a", add_special_tokens=False).ids[0]], 1)  # loads the file

    def _run(self, tokens: Sequence[int], count: int) -> Any:
        """Statistics of one greedy answer."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        config = GenerationConfig(max_new_tokens=count, temperature=0.0, echo=False)
        statistics: list[Any] = []
        self.runner.reset()
        self.runner.generate(text, config, None, statistics.append)  # a text callback fails on half a character
        return statistics[-1]

    def prompt(self, tokens: Sequence[int]) -> Pass:
        stats = self._run(tokens, 1)
        return Pass(stats.num_prompt_tokens, (stats.prompt_eval_end_ms - stats.inference_start_ms) * _NS_PER_MS)

    def generate(self, tokens: Sequence[int], count: int) -> Pass:
        stats = self._run(tokens, count + 1)  # the first token comes from the prompt's logits
        return Pass(stats.num_generated_tokens, (stats.inference_end_ms - stats.prompt_eval_end_ms) * _NS_PER_MS)

    def logits(self, tokens: Sequence[int], prefill: int) -> NDArray[np.float32]:
        raise ValueError(f"TextLLMRunner gives text only, no logits for {len(tokens) - prefill + 1} positions")


def open_runner(opening: Opening) -> _TextRunner:
    """Load a .pte with its tokenizer; both thread pools as in `pte`."""
    torch.set_num_threads(opening.threads)
    _unsafe_reset_threadpool(opening.threads)
    return _TextRunner(opening.path, opening.tokenizer)
