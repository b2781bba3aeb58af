"""What goes into and out of an artifact: names, shapes, dtypes, cache layout. Shared with every runner; no torch."""

from typing import Literal

from .plan import Strict


class TensorSpec(Strict):
    """One input, output or state. A string in the shape is a dynamic dimension (`sequence`, `past`, `total`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class KVLayout(Strict):
    """How the artifact keeps keys and values."""

    kind: Literal["io", "state"]
    """`io`: past/present tensors the caller passes around; `state`: the runtime keeps them."""
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    context_length: int
    """Slots; positions 0…context_length-1 can be fed."""


class TokenizerIds(Strict):
    """Special token ids, as runners need them."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    """Every id that ends an answer (Llama 3.2 Instruct has three)."""
    has_chat_template: bool


class IOContract(Strict):
    """The artifact's interface."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]
    kv: KVLayout
    max_prefill: int
    """Most tokens one call takes."""
    logits: Literal["last", "all"]
    """Positions the logits cover: the last one fed, or every one."""
