"""A layer of the full model, and what its linears read and give. Knows no quantization."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Layer
from ..plan import Architecture

ReadWeight = Callable[[str], Tensor]


def load_layer(read: ReadWeight, a: Architecture, prefix: str) -> Layer:
    """One layer with the checkpoint's weights."""
    with torch.device("meta"):
        layer = Layer(a)
    for name, _ in list(layer.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, nn.Parameter(read(prefix + name), requires_grad=False))
    return layer


@contextmanager
def observed(layer: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Name of each linear in the layer → its last inputs [W, L, K] and outputs [W, L, N]."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen[name] = inputs[0], output

        return hook

    linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(watch(name)) for name, module in linears]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
