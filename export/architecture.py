"""A Llama decoder: its shapes, the names of its tensors (Hugging Face's) and which linears share an input. No torch."""

from math import prod
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ROTATE_IN, ROTATE_OUT = "model.rotate_in.weight", "model.rotate_out.weight"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
"""Linears of a layer that read the same input, in the order in which their rows are stacked."""
Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RopeScaling(Strict):
    """Llama 3 frequency scaling (transformers `rope_type: llama3`; `apply_scaling` in llama-models)."""

    factor: PositiveNumber
    """By which the long wavelengths become slower."""
    low_freq_factor: PositiveNumber
    """Wavelengths over the original context divided by it are long."""
    high_freq_factor: PositiveNumber
    """Wavelengths under the original context divided by it stay as they are."""
    original_max_position_embeddings: Positive
    """The context that the model was trained on before, tokens."""

    @model_validator(mode="after")
    def _factors_differ(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not more than low_freq_factor {self.low_freq_factor}"
            )
        return self


class Architecture(Strict):
    """Shapes of a Llama decoder, under the names of Hugging Face's config.json."""

    vocab_size: Positive
    """Rows of embedding and head."""
    hidden_size: Positive
    """Width of the residual stream."""
    intermediate_size: Positive
    """Width of the MLP."""
    num_hidden_layers: Annotated[int, Field(gt=0, le=1024)]
    """Decoder layers."""
    num_attention_heads: Positive
    """Of the queries."""
    num_key_value_heads: Positive
    """Of keys and values; it divides `num_attention_heads`."""
    head_dim: Positive
    """Width of one head, an even number."""
    rope_theta: PositiveNumber
    """Base of the rotary embedding's wavelengths."""
    rope_scaling: RopeScaling | None
    """Llama 3's stretching of long wavelengths; null: none."""
    rms_norm_eps: PositiveNumber
    """Added to the mean square in every norm."""
    tie_word_embeddings: bool
    """Whether the embedding is the head too."""
    max_position_embeddings: Positive
    """Longest context that the checkpoint allows, tokens."""
    rotated: bool = False
    """Two linears rotate the residual stream, after the embedding and before the head. No checkpoint has them: a recipe
    adds them (`export/quantization/rotation.py`)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "Architecture":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding rotates pairs")
        return self

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name → (out_features N, in_features K) of every linear inside the layers, in execution order."""
        d, ff = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (ff, d),
            "mlp.up_proj": (ff, d),
            "mlp.down_proj": (d, ff),
        }
        return {
            f"model.layers.{i}.{name}.weight": shape
            for i in range(self.num_hidden_layers)
            for name, shape in layer.items()
        }

    def norm_names(self) -> list[str]:
        """Weights of the norms in execution order: two per layer, then the final one."""
        kinds = ("input_layernorm", "post_attention_layernorm")
        return [f"model.layers.{i}.{kind}.weight" for i in range(self.num_hidden_layers) for kind in kinds] + [
            FINAL_NORM
        ]

    def rotation_shapes(self) -> dict[str, tuple[int, int]]:
        """Name → [hidden, hidden] of the rotations: the first runs before all layers, the second after them."""
        return dict.fromkeys((ROTATE_IN, ROTATE_OUT) if self.rotated else (), (self.hidden_size, self.hidden_size))

    def all_linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name → (N, K) of every linear in execution order: rotations too, the head last even where it is tied."""
        rotations = list(self.rotation_shapes().items())
        head = (HEAD, (self.vocab_size, self.hidden_size))
        return dict([*rotations[:1], *self.linear_shapes().items(), *rotations[1:], head])

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor of the model; the head only when it is not tied."""
        d, vocab = self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, d), **self.all_linear_shapes()}
        head = shapes.pop(HEAD)
        shapes |= dict.fromkeys(self.norm_names(), (d,))
        if not self.tie_word_embeddings:
            shapes[HEAD] = head
        return shapes

    @property
    def parameters(self) -> int:
        """Numbers in the checkpoint: tied weights count once, rotations, which a recipe adds, do not."""
        return sum(prod(shape) for _, shape in self.tensor_shapes().items() - self.rotation_shapes().items())
