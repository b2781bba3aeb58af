"""How a task wants its answers generated, as far as greedy decoding can. Knows no model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from export.errors import ExportError

MAX_GEN_TOKS = 256
"""New tokens where a task does not say, as in lm-evaluation-harness's HFLM."""
GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


@dataclass(frozen=True)
class Generation:
    """One kind of answer."""

    until: tuple[str, ...]
    """Strings that end it, not part of it."""
    most: int
    """New tokens."""
    room: int
    """Tokens left for the prompt."""


def read(asked: Mapping[str, Any], context_length: int) -> Generation:
    """A task's generation_kwargs; sampling, beams and answers as long as the context are refused."""
    kwargs = normalize_gen_kwargs(dict(asked), MAX_GEN_TOKS)
    if kwargs["do_sample"] or (unknown := sorted(kwargs.keys() - GREEDY)):
        what = "sampling" if kwargs["do_sample"] else ", ".join(unknown)
        raise ExportError(f"generation_kwargs ask for {what}; artifacts decode greedily, choose another task")
    most = int(kwargs["max_gen_toks"])
    if most >= context_length:
        raise ExportError(f"{most} new tokens leave no room for a prompt in a context of {context_length}")
    until = tuple(stop for stop in handle_stop_sequences(kwargs["until"], eos=None) if stop)
    return Generation(until, most, context_length - most)
