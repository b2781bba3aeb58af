"""How far two models' predictions are apart. Knows no models."""

from collections.abc import Iterable

from torch import Tensor


def mean_kl(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean over positions of KL(P‖Q), nats, from logits [L, V] of P and Q, some positions at a time."""
    total, count = 0.0, 0
    for full, quantized in pairs:
        p, q = full.log_softmax(-1), quantized.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
        count += len(full)
    return total / count
