"""Text the model writes itself: answers to prompts through its chat template. What it will read on a device.

Rows advance together, one token at a time; a row that is still in its prompt takes the prompt's token instead of the
one drawn, so prompts of different lengths need no padding. A finished answer is followed by the next prompt.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from .. import chat_template
from ..errors import ExportError
from ..model import Llama
from ..progress import track

SEED = 0


def prompt_ids(prompts: Sequence[str], tokenizer: Any, origin: str) -> list[list[int]]:
    """Each prompt as the user's turn of a conversation, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise ExportError(
            f"{origin}: no chat template, through which the mixture's text is generated; use another mixture"
        )
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [chat_template.token_ids(tokenizer, turn, origin) for turn in turns]


def conversations(model: Llama, prompts: Sequence[list[int]], ends: frozenset[int], rows: int, length: int) -> Tensor:
    """Token ids int64 [rows, length], drawn from the model's own distribution, seeded.

    `ends` are tokens that end an answer. Row r begins with prompt r, r + rows and so on follow.
    """
    queues = [cycle(islice(cycle(prompts), row, row + len(prompts) * rows, rows)) for row in range(rows)]
    given = [list(next(queue)) for queue in queues]
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(SEED)
    ids = torch.tensor([[row[0]] for row in given], device=model.lm_head.weight.device)
    cache = None
    with torch.inference_mode():
        for at in track(range(1, length), "generate", length - 1):
            logits, cache = model(ids[:, -1:], cache)
            drawn = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)[:, 0].tolist()
            step = list(taken(given, drawn, at, queues, ends))
            ids = torch.cat([ids, torch.tensor(step, device=ids.device)[:, None]], 1)
    return ids.cpu()


def taken(
    given: list[list[int]], drawn: Sequence[int], at: int, queues: Sequence[Iterator[list[int]]], ends: frozenset[int]
) -> Iterator[int]:
    """The token of each row at a position: its prompt's while it has one, else the drawn one."""
    for row, token, queue in zip(given, drawn, queues, strict=True):
        if at < len(row):
            yield row[at]
            continue
        row.append(token)
        if token in ends:
            row.extend(next(queue))
        yield token
