"""ExecuTorch .pte through the Python runtime; the cache is a mutable buffer of the program.

With a window the token of position p is in slot p mod C: it leaves when that of p + C comes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# the module behind `executorch.runtime`, which would import the compiler too: four seconds, in every process
from executorch.extension.llm import custom_ops
from executorch.extension.pybindings._C import ExecuTorchMethod, Verification, _load_program, _unsafe_reset_threadpool
from executorch.kernels import quantized  # noqa: F401  (its import loads the quantized embedding)
from numpy.typing import NDArray

from export.manifest import Manifest

from .base import CacheError, Session

RUNTIME = "ExecuTorch Python runtime, stepped"
(_OPS,) = Path(custom_ops.__path__[0]).glob("libcustom_ops_aot_lib.*")
torch.ops.load_library(_OPS)  # type: ignore[no-untyped-call]  # custom_sdpa and update_cache


class PteSession(Session):
    """One loaded program; a call takes up to as many tokens as it was exported for."""

    def __init__(self, program: Any, context_length: int, largest_call: int, names: Sequence[str] = ()) -> None:
        """`names`: of the cache's buffers, where the program has them."""
        self.program, self.method, self.names = program, program.load_method("forward"), names
        super().__init__(
            context_length, largest_call, "last", self.method.method_meta().output_tensor_meta(0).sizes()[-1]
        )

    def step(self, tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        self.oldest = max(self.oldest, position + len(tokens) - self.room)  # even where the call fails half-way
        (logits,) = self.method([torch.tensor([tokens]), torch.tensor([position])])
        last: NDArray[np.float32] = logits.reshape(1, -1).numpy()
        return last

    def buffers(self) -> dict[str, NDArray[Any]]:
        if not self.names:
            raise CacheError("this .pte does not name its KV cache, an earlier version built it: build it again")
        return {name: _array(self.method.get_attribute(name)).swapaxes(0, 1) for name in self.names}


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's own memory; numpy has no bfloat16."""
    shown: NDArray[Any] = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return shown


def load_program(path: Path, threads: int) -> Any:
    """A program, verified for internal consistency, that computes in two thread pools: ExecuTorch's and torch's."""
    # attention's matrix products run in torch's pool; pools of different sizes compete by spinning
    torch.set_num_threads(threads)
    _unsafe_reset_threadpool(threads)
    return _load_program(str(path), program_verification=Verification.InternalConsistency)


def runtime_calls() -> list[tuple[type[Any], str]]:
    """The method that every step executes."""
    return [(ExecuTorchMethod, "__call__")]


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> PteSession:
    """Load the folder's `.pte`."""
    program = load_program(folder / manifest.plan.target.artifact, threads)
    contract = manifest.contract
    names = [state.name for state in contract.states]
    session = PteSession(program, contract.kv.context_length, contract.max_prefill, names)
    session.keep(contract.kv)
    return session
