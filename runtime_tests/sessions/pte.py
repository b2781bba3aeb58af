"""ExecuTorch .pte through the Python runtime; the cache lives in the program. Knows token ids, never text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export.manifest import Manifest

from ..session import feed_one_by_one


class PteSession:
    """One loaded program. Every position that is read was written by this run, so nothing is ever erased."""

    measures_speed = True

    def __init__(self, path: Path, manifest: Manifest, threads: int) -> None:
        # custom_sdpa, update_cache and the quantized embedding live in libraries these imports load
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        # attention's matrix products run in torch's pool; pools of different sizes spin against each other
        torch.set_num_threads(threads)
        _unsafe_reset_threadpool(threads)
        self._program = Runtime.get().load_program(path)  # verifies the program's internal consistency
        self._method = self._program.load_method("forward")
        self._context = manifest.contract.kv.context_length
        self._piece = manifest.contract.max_prefill
        self._position = 0

    def reset(self) -> None:
        self.rewind(0)

    def rewind(self, length: int) -> None:
        self._position = length

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if not tokens or self._position + len(tokens) > self._context:
            raise ValueError(f"{len(tokens)} tokens at position {self._position}: the context holds {self._context}")
        for start in range(0, len(tokens), self._piece):
            piece = torch.tensor([tokens[start : start + self._piece]])
            (logits,) = self._method.execute([piece, torch.tensor([self._position])])
            self._position += piece.shape[1]
        last: NDArray[np.float32] = logits.reshape(-1).numpy().copy()
        return last

    def feed_each(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return feed_one_by_one(self, tokens)

    def close(self) -> None:
        del self._method, self._program


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> PteSession:
    """Load the folder's `.pte`."""
    return PteSession(folder / manifest.plan.target.artifact, manifest, threads)
