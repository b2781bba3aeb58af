"""Any onnxruntime-genai folder, ours or the builder's, by the same calls and with the same number of threads."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

from runtime_tests.jobs import Opening
from runtime_tests.sessions.timing import elapsed_ns

from . import Pass, Runner


class _GenaiRunner(Runner):
    """Each pass begins with a new generator, whose cache is allocated outside the clock."""

    def __init__(self, folder: str, context: int, threads: int) -> None:
        config = og.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = og.Model(config)
        self.context = context

    def _generator(self) -> Any:
        """Greedy, never ending early: with min_length the end-of-sequence token is not chosen."""
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context, min_length=self.context, do_sample=False, batch_size=1)
        return og.Generator(self.model, params)

    def prompt(self, tokens: Sequence[int]) -> Pass:
        generator = self._generator()
        return Pass(len(tokens), elapsed_ns(lambda: generator.append_tokens(_row(tokens))))

    def generate(self, tokens: Sequence[int], count: int) -> Pass:
        generator = self._generator()
        generator.append_tokens(_row(tokens))
        generator.generate_next_token()  # from the prompt's logits: no model call
        return Pass(count, elapsed_ns(lambda: [generator.generate_next_token() for _ in range(count)]))

    def logits(self, tokens: Sequence[int], prefill: int) -> NDArray[np.float32]:
        generator = self._generator()
        generator.append_tokens(_row(tokens[:prefill]))
        rows = [_last_logits(generator)]
        for token in tokens[prefill:]:
            generator.append_tokens(_row([token]))
            rows.append(_last_logits(generator))
        return np.stack(rows)


def _row(tokens: Sequence[int]) -> NDArray[np.int32]:
    """A batch of one, [1, S]."""
    return np.array([tokens], np.int32)


def _last_logits(generator: Any) -> NDArray[np.float32]:
    """Logits [V] of the last position, whether the graph gives one or all."""
    last: NDArray[np.float32] = np.array(generator.get_output("logits"), np.float32)[0, -1]
    return last


def open_runner(opening: Opening) -> _GenaiRunner:
    """Load a folder with a genai_config.json."""
    return _GenaiRunner(opening.path, opening.context, opening.threads)
