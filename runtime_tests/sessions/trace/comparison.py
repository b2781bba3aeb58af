"""An artifact's values beside the eager model's: each part from the artifact's own values, and everything so far.

Where only the whole is compared, every part after a fault looks faulty, and rounding that adds up looks like a fault.
A part that is fed with the artifact's own values answers for itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from export.architecture import Strict
from export.model import Layer, Llama, rope_tables
from runtime_tests.checks.accuracy import BEST_SQNR_DB, sqnr_db

from . import points
from .points import Points


class Part(Strict):
    """The SQNR of one part of one layer, dB, median over its tokens; -200 where a value is not finite."""

    layer: int | None
    """None: embedding, its rotation, or head."""
    name: str
    """`attention` (with q, k, v), `o_proj`, `mlp`; parts that the artifact gives one value of are joined by `+`."""
    alone: float
    """Of what it adds to the residual stream, from the values that the artifact itself gave it."""
    so_far: float
    """Of the value itself, everything before it included."""


class _Expected(NamedTuple):
    """What a part should give [S, n], and the residual stream that it adds to."""

    value: Tensor
    base: Tensor


def compare(model: Llama, tokens: Sequence[int], read: Points) -> Iterator[Part]:
    """Every part whose value was read, in the order of computation."""
    found = {name: torch.from_numpy(value) for name, value in read.items()}
    alone, whole = _expected(model, tokens, found), _expected(model, tokens, {})
    joined: list[str] = []
    for name, expected in alone.items():
        joined.append(name)
        if name not in found:
            continue
        kinds = [one.rpartition(" ")[2] for one in joined]
        layers = [one.partition(" ")[0] for one in joined if " " in one]
        yield Part(
            layer=int(layers[0]) if layers else None,
            name="+".join(kinds),
            alone=_median(expected.value - expected.base, found[name] - expected.base),
            so_far=_median(whole[name].value[-len(found[name]) :], found[name]),
        )
        joined = []


@torch.inference_mode()
def _expected(model: Llama, tokens: Sequence[int], found: Mapping[str, Tensor]) -> dict[str, _Expected]:
    """What every part gives, computed from the values right before it that were found, else from expected ones."""
    made: dict[str, _Expected] = {}

    def at(name: str, value: Tensor, base: Tensor | None = None) -> Tensor:
        made[name] = _Expected(value[0], torch.zeros(1) if base is None else base[0])
        return found[name][None] if name in found else value

    cos, sin = rope_tables(model.architecture, len(tokens))
    rows = len(found.get(points.LOGITS, tokens))  # the last layer may compute no more than it has to
    x = at(points.EMBEDDING, model.model.embed_tokens(torch.tensor([list(tokens)])))
    if model.architecture.rotated:
        x = at(points.ROTATION, model.model.rotate_in(x))
    for i, module in enumerate(model.model.layers):
        assert isinstance(module, Layer)
        heads = at(points.attention(i), _heads(module, x, cos, sin))
        if i == model.architecture.num_hidden_layers - 1:
            x, heads = x[:, -rows:], heads[:, -rows:]
        middle = at(points.o_proj(i), x + module.self_attn.o_proj(heads), x)
        base = middle if points.o_proj(i) in found else x
        x = at(points.mlp(i), middle + module.mlp(module.post_attention_layernorm(middle)), base)
    at(points.LOGITS, model.lm_head(model.model.rotate_out(model.model.norm(x))))
    return made


def _heads(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What o_proj is given."""
    given: list[Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0]))
    layer.self_attn(layer.input_layernorm(x), cos, sin, None)
    hook.remove()
    return given[0]


def _median(reference: Tensor, candidate: Tensor) -> float:
    """SQNR, dB, of the token in the middle: the first token's stream is a hundred times the others' in many models."""
    if not bool(candidate.isfinite().all()):
        return -BEST_SQNR_DB
    signal, noise = (values.double().square().sum(1) for values in (reference, reference - candidate))
    each = sorted(sqnr_db(float(s), float(n)) for s, n in zip(signal, noise, strict=True))
    return round(each[len(each) // 2], 1)
