"""Text → token windows of one length, for calibration and evaluation."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.checkpoints import chat_template
from export.checkpoints.tokenizer import adds_bos
from export.errors import ExportError, absence, found
from export.host.console import track
from export.model import Llama
from export.plan import CONFIGS, Mixture

TEXT = CONFIGS / "calibration"
_SEED = 0


def cut(text: str, label: str, count: int, length: int, tokenizer: Any) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly over the text; each begins with BOS where prompts do.

    Raises ExportError with the text's `label` where it is too short.
    """
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    body, stride = length - len(start), len(ids) // count
    if stride < body:
        raise ExportError(f"{label} of {len(ids)} tokens is too short for {count} windows of {length}")
    return [start + ids[i * stride : i * stride + body] for i in range(count)]


def windows(mixture: Mixture, tokenizer: Any) -> torch.Tensor:
    """Token ids int64 [W, L] of all texts."""
    rows: list[list[int]] = []
    for text in mixture.texts:
        rows += cut(read(text.file), f"calibration text {text.file}", text.windows, mixture.length, tokenizer)
    return torch.tensor(rows)


def place(name: str) -> Path:
    """Where a calibration text is, the user's own before ours."""
    return found(TEXT, name)


def read(name: str) -> str:
    """A calibration text, by its file's name in configs/calibration."""
    path = place(name)
    if not path.is_file():
        raise ExportError(f"{path}: {absence(path)}; a mixture in configs/mixtures names it")
    return path.read_text(encoding="utf-8")


def lines(name: str) -> list[str]:
    """The lines of a text that are not empty."""
    return [line for line in read(name).splitlines() if line.strip()]


def sha256(mixture: Mixture | None) -> dict[str, str]:
    """File → sha256 of every text that a mixture reads."""
    if mixture is None:
        return {}
    names = [text.file for text in mixture.texts] + ([mixture.generated.prompts] if mixture.generated else [])
    return {name: hashlib.sha256(read(name).encode()).hexdigest() for name in names}


def day(mixture: Mixture | None) -> str | None:
    """The date in text that passes a chat template; None: no text does."""
    return chat_template.FIXED_DAY if mixture and mixture.generated else None


def prompt_ids(prompts: Sequence[str], tokenizer: Any, origin: str) -> list[list[int]]:
    """Each prompt as the user's turn of a conversation, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise ExportError(
            f"{origin}: no chat template, through which the mixture's text is generated; use another mixture"
        )
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [chat_template.token_ids(tokenizer, turn, origin, chat_template.FIXED_DAY) for turn in turns]


def conversations(model: Llama, prompts: Sequence[list[int]], ends: frozenset[int], rows: int, length: int) -> Tensor:
    """Token ids int64 [rows, length], drawn from the model's own distribution, seeded.

    `ends` are tokens that end an answer: the row's next prompt follows. Row r begins with prompt r, then come
    r + rows, r + 2 · rows and so on.
    """
    queues = [cycle(islice(cycle(prompts), row, row + len(prompts) * rows, rows)) for row in range(rows)]
    given = [list(next(queue)) for queue in queues]
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(_SEED)
    ids = torch.tensor([[row[0]] for row in given], device=model.lm_head.weight.device)
    cache = None
    with torch.inference_mode():
        for at in track(range(1, length), "generate", length - 1):
            logits, cache = model(ids[:, -1:], cache)
            drawn = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)[:, 0].tolist()
            step = list(_next_tokens(given, drawn, at, queues, ends))
            ids = torch.cat([ids, torch.tensor(step, device=ids.device)[:, None]], 1)
    return ids.cpu()


def _next_tokens(
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
