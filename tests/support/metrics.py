"""Tokens, what the eager model and an artifact answer to them, and how far these answers are apart."""

import numpy as np
import torch

from export.quantization.eager import eager


def random_tokens(count, seed=7, vocab=512):
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def eager_logits(model, tokens, window=None):
    """Of a checkpoint or a quantized model, float32 [S, V]; each token attends to the last `window`, or to all."""
    with torch.no_grad():
        return eager(model.read, model.architecture, "none", window)(torch.tensor([list(tokens)]))[0][0]


def forced_logits(session, tokens, prefill):
    """After the prefill and after each further token, float32 [S - prefill + 1, V]."""
    rows = [session.feed(tokens[:prefill]), *(session.feed([token]) for token in tokens[prefill:])]
    return torch.from_numpy(np.stack(rows))


def mean_kl(reference, logits):
    """KL(reference ‖ logits), nats."""
    p, q = (torch.as_tensor(rows).double().log_softmax(-1) for rows in (reference, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def sqnr_db(reference, logits):
    reference, logits = (torch.as_tensor(rows).double() for rows in (reference, logits))
    return float(10 * torch.log10(reference.square().sum() / (reference - logits).square().sum()))
