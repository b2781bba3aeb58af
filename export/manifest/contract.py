"""An artifact's interface, as its manifest tells it: names, shapes, KV cache and special tokens."""

from typing import Annotated, Literal

from pydantic import Field

from export.architecture import Positive, Strict


class TensorSpec(Strict):
    """One input, output or state. A string in the shape is a dynamic dimension (`sequence`, `past`, `total`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class KVLayout(Strict):
    """The artifact's KV cache."""

    kind: Literal["io", "state"]
    """`io`: past/present tensors that the caller passes around; `state`: the runtime holds them."""
    dtype: str
    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    context_length: Positive
    """Positions 0…context_length-1 can be fed."""
    window: Annotated[Positive | None, Field(exclude_if=lambda window: window is None)] = None
    """Tokens that each one attends to, the last ones, itself among them; null: all before it."""
    slots: Annotated[Positive | None, Field(exclude_if=lambda slots: slots is None)] = None
    """With a window: positions that the cache has room for, and reuses; null: for the whole context."""
    sink: Annotated[Positive | None, Field(exclude_if=lambda sink: sink is None)] = None
    """First tokens that never leave. In a full context the older half of the others leaves, the rest moves up to their
    positions, its keys turned to them; null: a full context takes no more tokens."""
    frequencies: Annotated[tuple[float, ...], Field(exclude_if=lambda frequencies: not frequencies)] = ()
    """With a sink: how far RoPE turns each pair of channels, i and i + D/2, of a key per position, radians, float32."""
    scale_bytes: Annotated[int, Field(ge=0, exclude_if=lambda count: count == 0)] = 0
    """In the cache, beside each head's keys of a position, and beside its values: their own scale and zero."""

    @property
    def room(self) -> int:
        """Positions that the buffers have room for."""
        return self.slots or self.context_length

    @property
    def longest_call(self) -> int:
        """Most new tokens of a call whose slots go round: one more would overwrite what its first token sees."""
        return self.slots - self.window + 1 if self.slots and self.window else self.context_length


class TokenizerIds(Strict):
    """Special token ids, as runners need them."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    """Every id that ends an answer (Llama 3.2 Instruct has three), sorted."""
    pad_id: int | None
    adds_bos: bool
    """Whether a text that is encoded begins with BOS; chat templates write their own."""
    ends: tuple[str, ...]
    """The tokens of `eos_ids` as text, where they have one: what a runner that decodes every token prints last."""
    chat_example: str | None
    """What the chat template writes for one question, up to the answer; null: there is none, a base model."""
    notes: tuple[str, ...]
    """What those who run the artifact must know of its tokenizer, a line each."""

    @property
    def has_chat_template(self) -> bool:
        """Whether it is a model to talk to."""
        return self.chat_example is not None


class IOContract(Strict):
    """The artifact's interface. Sessions read names, shapes and limits here, on a device from manifest.json."""

    inputs: tuple[TensorSpec, ...]
    """Token ids, then the mask or the position, then the past of every layer where `kv` is `io`."""
    outputs: tuple[TensorSpec, ...]
    """Logits, then the presents in the order of the pasts."""
    states: tuple[TensorSpec, ...]
    kv: KVLayout
    max_prefill: Positive
    """Most tokens that one call takes; a session may feed fewer, so that the logits of a call stay small."""
    logits: Literal["last", "all"]
    """Positions that the logits cover: the last one fed, or all."""
