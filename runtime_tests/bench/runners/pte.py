"""Any decoder .pte with inputs (tokens [1, S], input_pos [1]), ours or `export_llm`'s, by the same runtime call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# custom_sdpa, update_cache and the quantized embedding live in libraries these imports load
import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401
import numpy as np
import torch
from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
from executorch.runtime import Runtime
from numpy.typing import NDArray

from ...jobs import Opening
from .stepping import SteppingRunner


class PteSteps:
    """A program that carries its own cache; what a call may hold is read from the file itself."""

    def __init__(self, path: Path, context: int) -> None:
        self._program = Runtime.get().load_program(path)
        self._method = self._program.load_method("forward")
        inputs = self._method.metadata.num_inputs()
        if inputs != 2:
            raise ValueError(f"{path}: forward takes {inputs} inputs; expected tokens and input_pos")
        self._piece = min(int(self._constant("get_max_seq_len")), context)
        self._position = 0

    def _constant(self, name: str) -> Any:
        return self._program.load_method(name).execute([])[0]

    def reset(self) -> None:
        self._position = 0

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        for start in range(0, len(tokens), self._piece):
            piece = torch.tensor([tokens[start : start + self._piece]])
            (logits,) = self._method.execute([piece, torch.tensor([self._position])])
            self._position += piece.shape[1]
        last: NDArray[np.float32] = logits.reshape(-1).numpy().copy()
        return last


def open_runner(opening: Opening) -> SteppingRunner:
    """Load a .pte. Its operators compute in two pools, ExecuTorch's and torch's (attention's matrix products)."""
    torch.set_num_threads(opening.threads)  # pools of different sizes spin against each other: ten times slower
    _unsafe_reset_threadpool(opening.threads)
    return SteppingRunner(PteSteps(Path(opening.path), opening.context))
